"""The course's names on one screen: what the notebooks use to claim, guess, draw, play and look up what was
measured.
"""
from lora_edu.course.figures.curves import (
                                            learn_forget_plane,
                                            plot_bands,
                                            plot_bars,
                                            plot_loss_curves,
                                            plot_points,
                                            plot_two_losses,
)
from lora_edu.course.figures.matrices import (
    plot_block,
    plot_levels,
    plot_picture_ranks,
    plot_singular_values,
    sample_picture,
)
from lora_edu.course.figures.memory import plot_beside, plot_bills
from lora_edu.course.figures.merging import plot_gain_kept, plot_latency, plot_methods_plane
from lora_edu.course.figures.rates import plot_rank_curves, plot_rates, plot_update_sizes
from lora_edu.course.figures.spectra import (
    plot_density,
    plot_layers,
    plot_parts,
    plot_shares_of_rank,
    plot_spectra,
    plot_what_is_kept,
)
from lora_edu.course.labs.adapter_mixer import adapter_mixer
from lora_edu.course.labs.alpha_dial import alpha_dial
from lora_edu.course.labs.memory_calculator import memory_calculator
from lora_edu.course.labs.merge_lab import merge_lab
from lora_edu.course.labs.rank_alpha_map import grid_explorer
from lora_edu.course.labs.rank_picture import rank_picture
from lora_edu.course.labs.spectrum_explorer import published_explorer, spectrum_explorer
from lora_edu.course.labs.target_picker import target_picker
from lora_edu.course.labs.trainer import live_trainer
from lora_edu.course.page.claims import article_ledger, claim, ledger
from lora_edu.course.page.guess import calibration, guess
from lora_edu.course.page.machine import keep_in, machine
from lora_edu.course.page.real_model import real_model
from lora_edu.course.page.show import show
from lora_edu.course.records.stored import better, load_record, tie
from lora_edu.tables import Table

__all__ = ["Table", "adapter_mixer", "alpha_dial", "article_ledger", "better", "calibration", "claim",
           "grid_explorer", "guess", "keep_in", "learn_forget_plane", "ledger", "live_trainer", "load_record",
           "machine", "memory_calculator", "merge_lab", "plot_bands", "plot_bars", "plot_beside", "plot_bills",
           "plot_block", "plot_density", "plot_gain_kept", "plot_latency", "plot_layers", "plot_levels",
           "plot_loss_curves", "plot_methods_plane", "plot_parts", "plot_picture_ranks", "plot_points",
           "plot_rank_curves", "plot_rates", "plot_shares_of_rank", "plot_singular_values", "plot_spectra",
           "plot_two_losses", "plot_update_sizes", "plot_what_is_kept", "published_explorer", "rank_picture",
           "real_model", "sample_picture", "show", "spectrum_explorer", "target_picker", "tie"]
