"""The rank-r picture: a slider over the rank of a compressed grey picture."""
import ipywidgets
import numpy as np

from lora_edu.course.figures.matrices import plot_picture_ranks
from lora_edu.course.page.widgets import picture_with_controls


def rank_picture(image, rank: int = 8, title: str = "Few numbers make a recognisable picture") -> ipywidgets.VBox:
    """A slider over the rank of a compressed grey picture, (height, width), drawn beside the original."""
    pixels = np.asarray(image, dtype=float)
    fig = plot_picture_ranks(pixels, ranks=(rank,), title=title, width=3.1)
    U, S, Vh = np.linalg.svd(pixels, full_matrices=False)
    part, full = fig.axes[1], np.linalg.norm(pixels)

    def update(rank):
        part.images[0].set_data(U[:, :rank] * S[:rank] @ Vh[:rank])
        count = rank * sum(pixels.shape)
        part.set_title(f"rank {rank}\n{count:,} numbers", fontsize=10)
        error = np.linalg.norm(S[rank:]) / full
        return (f"rank {rank}: {rank} × ({pixels.shape[0]} + {pixels.shape[1]}) = {count:,} numbers in place of "
                f"{pixels.size:,} ({count / pixels.size:.0%}); "
                f"error {error:.1%} of the picture's size (Frobenius norm)")

    return picture_with_controls(fig, update,
                                 rank=ipywidgets.IntSlider(value=rank, min=1, max=len(S), description="rank r"))
