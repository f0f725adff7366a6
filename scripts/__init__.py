"""Commands: each parses its flags, calls one function of libs, and prints what came of it."""

import argparse


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Of `python -m scripts.<name>`; --help prints the module's docstring `doc` as it is."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f"python -m scripts.{name}", description=doc, formatter_class=raw)
