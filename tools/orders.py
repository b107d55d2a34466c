"""The file of orders that notebook 08 teaches from, made again: python tools/orders.py

A guest says what the table would like; the answer is one line of JSON for the kitchen. Guests count in words and in
digits, change their minds about the table, and leave things out. Every guest says something else, so no order is in the
file twice.
"""
import csv
import json
import random
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "lora_edu" / "course" / "orders.csv"
ROWS = 400
DISHES = (("lentil soup", "lentil soups"), ("onion tart", "onion tarts"), ("fish pie", "fish pies"),
          ("roast chicken", "roast chickens"), ("pea risotto", "pea risottos"), ("apple cake", "apple cakes"),
          ("plum dumpling", "plum dumplings"), ("green salad", "green salads"), ("lemonade", "lemonades"),
          ("black coffee", "black coffees"), ("ginger tea", "ginger teas"), ("cider", "ciders"))
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
LEFT_OUT = ("garlic", "pepper", "butter", "cheese", "nuts", "ice", "salt", "cream")
STARTS = ("Could we have {order}, please?", "{order}, please.", "Good evening! We would like {order}.",
          "I think we will take {order}.", "Hello, {order} for us.", "Can you bring {order}?")
PLACES = ("We are at table {table}.", "That is for table {table}.", "Table {table}.", "We sit at {table}.")
SECOND_THOUGHTS = ("Table {wrong}. No, sorry, table {table}.", "We are at {wrong}, wait, it says {table}.")
WISHES = ("No {thing}.", "Without {thing}, if you can.", "And please leave out the {thing}.", "I cannot eat {thing}.")


def number(rng: random.Random, n: int) -> str:
    return NUMBERS[n] if rng.random() < 0.6 else str(n)


def one(rng: random.Random) -> tuple[str, str]:
    """A guest's words, and the line for the kitchen."""
    dishes = {dish: rng.choice((1, 1, 1, 2, 2, 3, 4)) for dish in rng.sample(DISHES, rng.choice((1, 2, 2, 3)))}
    said = [f"{'a' if n == 1 and rng.random() < 0.5 else number(rng, n)} {dish[n > 1]}".replace("a apple", "an apple")
            .replace("a onion", "an onion") for dish, n in dishes.items()]
    order = " and ".join(", ".join(said).rsplit(", ", 1))
    table, wrong = rng.sample(range(1, 13), 2)
    thing = rng.choice(LEFT_OUT) if rng.random() < 0.4 else None
    place = rng.choice(SECOND_THOUGHTS if rng.random() < 0.25 else PLACES)
    sentences = [rng.choice(STARTS).format(order=order),
                 place.format(table=number(rng, table), wrong=number(rng, wrong))]
    sentences += [rng.choice(WISHES).format(thing=thing)] if thing else []
    text = " ".join(sentences)
    answer = {"table": table, "order": {dish[0]: n for dish, n in dishes.items()}, "without": thing}
    return text[0].upper() + text[1:], json.dumps(answer)


def main() -> None:
    rng, rows = random.Random("orders"), {}
    while len(rows) < ROWS:
        guest, kitchen = one(rng)
        rows[guest] = kitchen
    with FILE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("guest", "kitchen"))
        writer.writerows(rows.items())
    print(f"{len(rows)} orders, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
