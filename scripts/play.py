"""A page in the browser: the same images at full depth and with exits, the depth of every image and call, both seconds.

    python -m scripts.play --nnet_path=demo/last.ckpt        then open http://127.0.0.1:7860

The slider goes over the budgets for which scripts.calibrate has put plans beside the weights; where there is none, over
certainties. Needs gradio (pip install gradio). The page is served to this machine only.
"""

from __future__ import annotations

import sys

import scripts
from libs import Sampler
from libs.analysis.figures import draw_depths
from libs.evaluation.side_by_side import SideBySide, side_by_side
from libs.regimes import Labels
from libs.sampling.images import Images

DRAWN = "drawn"


def main(argv: list[str] | None = None) -> None:
    parser = scripts.parser("play", __doc__)
    parser.add_argument("--nnet_path", required=True, help="weights: a <step>.ckpt folder or a run's folder")
    parser.add_argument("--n", type=int, default=8, help="images, with ids 0 to n - 1 (default 8)")
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], help="default: the experiment's")
    parser.add_argument("--port", type=int, default=7860, help="of the page (default 7860)")
    args = parser.parse_args(argv)
    try:
        built = page(Sampler.load(args.nnet_path, device=args.device, precision=args.precision), args.n)
        built.launch(server_port=args.port)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def page(sampler: Sampler, n: int = 8):
    """The Gradio page, not yet served."""
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("scripts.play needs gradio: pip install gradio") from error

    conditions, depth = sampler.regime.conditions, sampler.model.depth
    classes = conditions.n_classes if isinstance(conditions, Labels) else 0
    names = list(sampler.class_names) or [str(i) for i in range(classes)]

    def compare(seed: int, told: str, amount: float):
        options = {}
        if classes and told != DRAWN:
            options["labels"] = [names.index(told)]
        elif told and not isinstance(conditions, Labels):
            options["prompts"] = [told]
        budget = max((b for b in sampler.budgets if b <= amount + 1e-9), default=None)
        options |= {"exit_threshold": amount} if budget is None else {"budget": budget}
        try:
            both = side_by_side(sampler, n, seed=int(seed), **options)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error)) from error
        what = f"certainty {amount:g}" if budget is None else f"the plan of budget {budget:g}"
        shown = [
            part
            for images in (both.full, both.early)
            for part in (gallery(images), draw_depths(images.depth, images.trace.t, depth))
        ]
        return speed_line(both, what), *shown

    with gr.Blocks(title="Adaptive depth") as built:
        gr.Markdown(f"## Adaptive depth\n{sampler.config.dataset.name}, {depth} layers, {n} images of one noise seed")
        with gr.Row():
            seed = gr.Number(0, label="seed", precision=0, minimum=0)
            if classes:
                told = gr.Dropdown([DRAWN, *names], value=DRAWN, label="class")
            elif isinstance(conditions, Labels):
                told = gr.State("")
            else:
                told = gr.Textbox(label="prompt")
            if budgets := sampler.budgets:
                label, plans = "budget: share of full depth's MACs", ", ".join(f"{budget:g}" for budget in budgets)
                amount = gr.Slider(
                    budgets[0], 1, budgets[-1], step=0.01, label=label, info=f"there are plans for {plans}"
                )
            else:
                amount = gr.Slider(0.5, 1, 0.98, step=0.005, label="certainty above which an image leaves; 1 = never")
        go = gr.Button("Sample", variant="primary")
        said = gr.Markdown()
        outputs = [said]
        with gr.Row():
            for title in ("full depth", "with exits"):
                with gr.Column():
                    gr.Markdown(f"### {title}")
                    pictures = gr.Gallery(show_label=False, columns=min(n, 4), object_fit="contain", format="png")
                    outputs += [pictures, gr.Plot(show_label=False)]
        gr.on([go.click, built.load], compare, [seed, told, amount], outputs)
    return built


def speed_line(both: SideBySide, what: str) -> str:
    full, early = both.seconds
    layers = [images.mean_depth.mean() for images in (both.early, both.full)]
    return (
        f"**{both.speed_up:.1f}x** the speed of full depth with {what}: {early:.2f} s instead of {full:.2f} s, "
        f"{both.early.trace.computed.sum()} calls instead of {both.full.trace.computed.sum()}, "
        f"on average {layers[0]:.1f} layers instead of {layers[1]:.1f}"
    )


def gallery(images: Images) -> list:
    """Pictures of at least 128 pixels."""
    scale = max(1, 128 // images.pixels.shape[-1])
    return [picture.resize((scale * picture.width, scale * picture.height), 0) for picture in images.pil()]


if __name__ == "__main__":
    main()
