"""The rank-r picture: a slider over the rank of a compressed grey picture."""
import base64

import numpy as np

from lora_edu.course.figures.matrices import as_matrix, plot_picture_ranks
from lora_edu.course.labs.lab import Lab, ranks_up_to


def rank_picture(image, rank: int = 8, title: str = "Few numbers make a recognisable picture") -> Lab:
    """A slider over the rank of a compressed grey picture, (height, width), 0 to 1, drawn beside the original.

    The ranks lie closer the smaller they are: every one up to 16.
    """
    pixels = as_matrix(image)
    (height, width), most = pixels.shape, min(pixels.shape)
    if not 1 <= rank <= most:
        raise ValueError(f"rank={rank} does not fit a {height} x {width} picture: choose 1 <= rank <= {most}.")
    U, S, Vh = np.linalg.svd(pixels, full_matrices=False)
    data = {"title": title, "height": height, "width": width, "ranks": ranks_up_to(most, rank), "values": S.tolist(),
            "left": packed((U * S).T), "right": packed(Vh)}
    return Lab("rank_picture", data, {"rank": rank}, in_words(pixels.shape, S, rank),
               plot_picture_ranks(pixels, ranks=(rank,), title=title, width=2.3))


def packed(matrix) -> dict:
    """A matrix for the page: 16 bits a number, row after row, and what one unit is worth."""
    scale = float(np.abs(matrix).max() / 32767) or 1.0
    return {"base64": base64.b64encode((matrix / scale).round().astype("<i2").tobytes()).decode(), "scale": scale}


def in_words(shape: tuple[int, int], S, rank: int) -> str:
    count, error = rank * sum(shape), np.linalg.norm(S[rank:]) / np.linalg.norm(S)
    return (f"rank {rank}: {rank} × ({shape[0]} + {shape[1]}) = {count:,} numbers in place of {shape[0] * shape[1]:,} "
            f"({count / (shape[0] * shape[1]):.0%}); error {error:.1%} of the picture's size (Frobenius norm)")
