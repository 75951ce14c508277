"""How clippers fare on the ten streams of `streams.py`: a mark for each, and the worst figures.

python benchmarks/ten_streams.py
"""

import platform

import jax
import optax
import streams

import optax_smartclip as smartclip

CLIPPERS = {
    "autoclip()": streams.from_transformation(smartclip.autoclip()),
    "zscore_clip()": streams.from_transformation(smartclip.zscore_clip()),
    "autoclip(95, geometric)": streams.from_transformation(
        smartclip.autoclip(95.0, history=smartclip.geometric_quantile())
    ),
    "autoclip(90)": streams.from_transformation(smartclip.autoclip(90.0)),
    "autoclip(10)": streams.from_transformation(smartclip.autoclip(10.0)),
    "clip_by_global_norm(1)": streams.from_transformation(optax.clip_by_global_norm(1.0), 1.0),
    "clip_by_global_norm(3)": streams.from_transformation(optax.clip_by_global_norm(3.0), 3.0),
}


def main() -> None:
    """Prints the table, then the figures of what failed."""
    versions = f"jax {jax.__version__}, optax {optax.__version__}, {platform.machine()}"
    print(f"Python {platform.python_version()}, {versions}, {jax.default_backend()}")
    print(f"{'clipper':24}" + "".join(f"{name:>5}" for name in streams.CHECKS))
    failed = []
    for name, clipper in CLIPPERS.items():
        results = {stream: check(clipper) for stream, check in streams.CHECKS.items()}
        marks = "".join(f"{'yes' if result.passed else '-':>5}" for result in results.values())
        print(f"{name:24}{marks}", flush=True)
        failed += [
            (name, stream, result.figures)
            for stream, result in results.items()
            if not result.passed
        ]
    for name, stream, figures in failed:
        listed = ", ".join(f"{figure} {value:.3g}" for figure, value in figures.items())
        print(f"{name:24} {stream:4} {listed}")


if __name__ == "__main__":
    main()
