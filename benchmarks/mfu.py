"""How much of a GPU's arithmetic a full-depth network call uses: model FLOPs utilisation (MFU).

    python -m benchmarks.mfu --dtype bf16                   # the peak of common cards is known
    python -m benchmarks.mfu --dtype bf16 --peak 989        # peak: the vendor's dense TFLOP/s for this format

Counts 2 FLOPs per multiply-accumulate of the network (libs/metrics/cost.py) and divides by the time and the peak.
"""

import re

import torch

from benchmarks.common import case_parser, in_turn, make_inputs, make_model, middle, sampling, save, table

# Dense bf16 TFLOP/s from the vendors' data sheets, by words of the name that CUDA reports; the first match counts.
PEAKS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "RTX 4090": 165,
}


def peak_of(device: str, dtype: str, given: float | None) -> float:
    """TFLOP/s to divide by: `given`, or what is known of the card in bf16 and fp16.

    Raises:
        ValueError: neither is there.
    """
    if given is not None:
        if not 0 < given < float("inf"):
            raise ValueError(f"--peak is {given}; it must be a positive number of TFLOP/s")
        return given
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    known = [peak for words, peak in PEAKS.items() if re.search(rf"\b{words}\b", name)]
    if dtype == "fp32" or not known:
        raise ValueError(f"the peak of {name} in {dtype} is not known; give the dense TFLOP/s with --peak (PEAK=...)")
    return known[0]


def main() -> None:
    arguments = case_parser(__doc__, sizes=("S/2", "L/2"), batches=(1, 8, 64, 256))
    arguments.add_argument("--peak", type=float, metavar="TFLOPS", help="of the device, dense; known for common cards")
    arguments.add_argument("--check", action="store_true", help="only say the peak, or why there is none")
    options = arguments.parse_args()
    try:
        options.peak = peak_of(options.device, options.dtype, options.peak)
    except ValueError as error:
        arguments.error(str(error))
    if options.check:
        print(f"peak: {options.peak:g} TFLOP/s")
        return
    cases, rows = {}, [("case", "seconds", "images/s", "TFLOP/s", "MFU")]
    for size in options.sizes:
        model = make_model(size, options.device)
        for batch in options.batches:
            x, _, time, cond = make_inputs(model, batch)

            def job(x=x, time=time, cond=cond, model=model):
                model.backbone(x, time, cond)

            with sampling(model, options.device, options.dtype):
                spent = middle(in_turn({"full": job}, options)["full"])
            reached = 2 * batch * model.macs().at(model.depth) / spent["median"] / 1e12
            case = f"{size} batch {batch} {options.dtype}"
            cases[case] = {"seconds": spent, "tflops": reached, "peak_tflops": options.peak}
            cases[case]["mfu"] = reached / options.peak
            rows.append((case, spent["median"], batch / spent["median"], reached, reached / options.peak))
    table(rows)
    save("mfu", options.device, cases)


if __name__ == "__main__":
    main()
