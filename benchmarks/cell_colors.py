"""The color of the text in a cell of a heat map."""

from collections.abc import Sequence

import numpy as np


def text_color(cell: Sequence[float]) -> str:
    """Black or white, whichever has the higher contrast to a cell.

    The contrast is that of WCAG 2.2, in which both are equal at a luminance of 0.179.

    Args:
        cell: Red, green, blue and opacity of the cell, on a white page.
    """
    *colors, opacity = cell
    encoded = 1 - opacity * (1 - np.asarray(colors))
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return "black" if linear @ [0.2126, 0.7152, 0.0722] > 0.179 else "white"
