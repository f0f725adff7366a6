"""Pieces of HTML that sections are made of; all text is escaped here, and every tag is closed as XML wants it."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape

from libs.report.plots import Figures

NARROW, DARK = "(max-width: 640px)", "(prefers-color-scheme: dark)"


def data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def picture(figures: Figures, alt: str) -> str:
    """One figure in the rendering that fits the reader's screen and theme."""
    uri = {name: data_uri(getattr(figures, name).encode(), "image/svg+xml") for name in vars(figures)}
    return (
        f'<picture><source media="{NARROW} and {DARK}" srcset="{uri["dark_narrow"]}"/>'
        f'<source media="{NARROW}" srcset="{uri["light_narrow"]}"/>'
        f'<source media="{DARK}" srcset="{uri["dark"]}"/>'
        f'<img src="{uri["light"]}" alt="{escape(alt)}"/></picture>'
    )


def figure(figures: Figures, alt: str, caption: str) -> str:
    return f"<figure>{picture(figures, alt)}<figcaption>{escape(caption)}</figcaption></figure>\n"


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>\n' if kind else f"<p>{escape(text)}</p>\n"


def card(name: str, value: str, unit: str, more: str, main: bool = False) -> str:
    unit = f' <span class="unit">{escape(unit)}</span>' if unit else ""
    return (
        f'<div class="card{" main" if main else ""}"><div class="name">{escape(name[:1].upper() + name[1:])}</div>'
        f'<div class="value">{escape(value)}{unit}</div><div class="more">{escape(more)}</div></div>\n'
    )


def facts(rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>\n" for name, value in rows)
    return f'<div class="table"><table class="facts"><tbody>{body}</tbody></table></div>\n'
