"""How fable was made: a tokenizer and a small `Llama`, trained from nothing on plain text.

    python -m lora_edu.course.records.pretrain --text tales.txt.gz=0.5 novels.txt.gz=0.5 --valid tales_valid.txt.gz
        --out FOLDER

Texts are UTF-8 (.gz or not) with documents separated by a line <|endoftext|>; `=0.5` is the share of the batches that a
text fills, whatever its size. What is read when is fixed by the seed alone, so a run that was interrupted (Ctrl-C, a
power cut) goes on from its last checkpoint when the same command is given again.
"""
import argparse
import itertools
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm

from lora_edu.files import write_text, write_whole
from lora_edu.models.bridge import END
from lora_edu.models.llama import Llama, LlamaConfig
from lora_edu.models.pretrained import best_device
from lora_edu.models.sizes import PRESETS
from lora_edu.training.corpora import read_text, tokenize, windows
from lora_edu.training.loop import adamw, evaluate, sixteen_bits, train, warmup_linear

SHAPE = PRESETS["fable"].llama_config()
TOKENS_A_STEP = 4096
CHECKPOINT_EVERY, EVALUATE_EVERY = 250, 500      # steps


def train_tokenizer(texts: list[str], vocab_size: int, characters_each: int = 9_000_000) -> Tokenizer:
    """Byte-level BPE: every text can be written in it. The end-of-text token has id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((text[:characters_each].replace(END, "") for text in texts), trainer)
    return tokenizer


def _window_lengths(steps: int, longest: int) -> list[int]:
    """Short windows first (attention over them costs less), the full context for the last third of the steps."""
    return [longest // 2 if step < steps * 2 // 3 else longest for step in range(steps)]


def reading_order(sizes: list[int], shares: list[float], steps: int, longest: int, seed: int):
    """Yield, for each step, (text, start) for every window of its batch, and the windows' length.

    A text is read from end to end at a random offset, its windows shuffled, before any of it comes again.
    """
    generator = torch.Generator().manual_seed(seed)
    waiting: dict[tuple[int, int], list[int]] = {}
    for length in _window_lengths(steps, longest):
        rows = TOKENS_A_STEP // length
        batch = []
        for text in torch.multinomial(torch.tensor(shares), rows, replacement=True, generator=generator).tolist():
            starts = waiting.setdefault((text, length), [])
            if not starts:
                offset = torch.randint(length, (), generator=generator).item()
                count = (sizes[text] - 1 - offset) // length
                starts += [offset + length * i for i in torch.randperm(count, generator=generator).tolist()]
            batch.append((text, starts.pop()))
        yield batch, length


def batches(tokens: list[torch.Tensor], order):
    for places, length in order:
        rows = torch.stack([tokens[text][start:start + length + 1] for text, start in places]).long()
        yield rows[:, :-1], rows[:, 1:]


def _save_checkpoint(file: Path, model: Llama, optimizer, step: int, curve: list) -> None:
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "curve": curve}
    write_whole(file, lambda part: torch.save(content, part))


def _go_on(file: Path, model: Llama, optimizer, device, steps: int) -> tuple[int, list]:
    """Steps done and the curve so far, from a checkpoint if there is one; model and optimizer are put back to it."""
    if not file.exists():
        return 0, []
    saved = torch.load(file, map_location=device, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    print(f"going on from step {saved['step']} of {steps}")
    return saved["step"], saved["curve"]


def pretrain(texts: dict[str, float], valid: str, out: str, tokens: float = 30e6, lr: float = 3e-3, seed: int = 0,
             config: LlamaConfig = SHAPE) -> float:
    """Train and write a model folder; returns the final loss on `valid` in nats per token.

    Args:
        texts: file -> share of the batches that come from it.
        tokens: how many tokens to read in all, repeats counted.
        out: folder for config.json, model.safetensors (bf16), tokenizer.json, curve.json; a checkpoint while it runs.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    steps = math.ceil(tokens / TOKENS_A_STEP)
    tokenizer, data, held_out, held_out_bytes = prepare(texts, valid, folder, config)
    device = best_device()
    torch.manual_seed(seed)
    model = Llama(config).to(device)
    optimizer = adamw(model, weight_decay=0.1, betas=(0.9, 0.98))
    checkpoint = folder / "checkpoint.pt"
    first, curve = _go_on(checkpoint, model, optimizer, device, steps)
    order = reading_order([len(t) for t in data], list(texts.values()), steps, config.max_position_embeddings, seed)
    order = itertools.islice(order, first, None)      # what an earlier call has read is not read again

    few = held_out[::max(1, len(held_out) // 8)]
    bar = tqdm(train(model, batches(data, order), steps, lr, schedule=warmup_linear(0.02), optimizer=optimizer,
                     autocast=sixteen_bits(device), first_step=first), total=steps, initial=first, unit="step",
               mininterval=5)
    loss = float("nan")
    for done in bar:
        loss = done.loss if math.isnan(loss) else 0.98 * loss + 0.02 * done.loss
        bar.set_postfix_str(f"loss {loss:.3f}, {done.tokens_per_second:,.0f} tokens/s", refresh=False)
        if done.step % EVALUATE_EVERY == 0 or done.step == steps:
            curve.append([done.step * TOKENS_A_STEP, round(loss, 4), round(evaluate(model, few), 4)])
            tqdm.write("tokens {:,}  train {:.3f}  valid (a sample) {:.3f}".format(*curve[-1]))
        if done.step % CHECKPOINT_EVERY == 0:
            _save_checkpoint(checkpoint, model, optimizer, done.step, curve)

    final = evaluate(model, held_out)
    model.save_folder(folder, dtype=torch.bfloat16)
    counted = sum((targets != -100).sum().item() for _, targets in held_out)
    how = {"tokens": steps * TOKENS_A_STEP, "steps": steps, "lr": lr, "seed": seed, "device": str(device),
           "shares": {Path(file).name: share for file, share in texts.items()}}
    _write_report(folder / "curve.json", how, final, counted / held_out_bytes, curve)
    checkpoint.unlink(missing_ok=True)
    return final


def _write_report(file: Path, how: dict, final: float, tokens_a_byte: float, curve: list) -> None:
    report = how | {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
                    "valid_nats_per_token": round(final, 4),
                    "valid_bits_per_byte": round(final * tokens_a_byte / math.log(2), 4),
                    "curve": {"columns": ["tokens read", "train loss (running mean)", "valid loss (a sample)"],
                              "rows": curve}}
    write_text(file, json.dumps(report, indent=1) + "\n")


def prepare(texts: dict[str, float], valid: str, folder: Path, config: LlamaConfig):
    """The tokenizer (trained once, then read back), every text as token ids, the held-out windows and their size in
    bytes.
    """
    raw = {file: read_text(file) for file in texts}
    file = folder / "tokenizer.json"
    if not file.exists():
        write_whole(file, lambda part: train_tokenizer(list(raw.values()), config.vocab_size).save(str(part)))
    tokenizer = Tokenizer.from_file(str(file))
    data = [tokenize(tokenizer, text).to(torch.int32) for text in raw.values()]
    held_out_text = read_text(valid)
    held_out_tokens = tokenize(tokenizer, held_out_text)
    size = len(held_out_text.encode())
    print(f"{sum(map(len, data)):,} tokens to learn from; "
          f"the held-out text has {size / len(held_out_tokens):.2f} bytes a token")
    return tokenizer, data, windows(held_out_tokens, config.max_position_embeddings), size


def text_and_share(argument: str) -> tuple[str, float]:
    file, _, share = argument.rpartition("=")
    return (file, float(share)) if file else (share, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lora_edu.course.records.pretrain",
                                     description="Train a small Llama on plain text.")
    parser.add_argument("--text", nargs="+", required=True, type=text_and_share, metavar="FILE[=SHARE]")
    parser.add_argument("--valid", required=True, metavar="FILE", help="held-out text, never trained on")
    parser.add_argument("--out", required=True, metavar="FOLDER")
    parser.add_argument("--tokens", type=float, default=30e6)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        final = pretrain(dict(args.text), args.valid, args.out, args.tokens, args.lr, args.seed)
    except KeyboardInterrupt:
        raise SystemExit(f"\nStopped. The same command goes on from the last checkpoint in {args.out}.") from None
    print(f"valid: {final:.4f} nats per token; written to {args.out}")


if __name__ == "__main__":
    main()
