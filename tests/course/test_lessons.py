"""The reader's own file: what is read, what is refused and in which words, how it is split, learned and judged."""
import json
import random
import time

import pytest
import torch

from lora_edu import apply_lora, evaluate, load_pretrained, train
from lora_edu.course import lessons
from lora_edu.course.lessons import ORDERS, fields_right, from_pairs, words_right
from lora_edu.training import bistro

ROWS = [(f"What is {n} and one?", f"It is {n + 1}, as everybody knows who has fingers.") for n in range(40)]


def write(tmp_path, name, content, encoding="utf-8"):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return file


def as_csv(rows, delimiter=",", head="prompt,answer\n"):
    return head + "\n".join(delimiter.join(f'"{cell}"' for cell in row) for row in rows) + "\n"


def all_pairs(lesson):
    return sorted(lesson.train + lesson.valid + lesson.test)


GOOD = {
    "comma.csv": as_csv(ROWS),
    "no_heading.csv": as_csv(ROWS, head=""),
    "semicolons.csv": as_csv(ROWS, ";", "prompt;answer\n"),
    "tabs.tsv": as_csv(ROWS, "\t", ""),
    "other_columns.csv": "id,Question,source,Answer\n" + "\n".join(f'{i},"{q}",me,"{a}"' for i, (q, a) in
                                                                   enumerate(ROWS)),
    "windows.csv": as_csv(ROWS).replace("\n", "\r\n").encode("utf-8-sig"),
    "utf16.csv": as_csv(ROWS).encode("utf-16"),
    "lines.jsonl": "\n".join(json.dumps({"prompt": q, "completion": a}) for q, a in ROWS),
    "list.json": json.dumps([{"instruction": q, "output": a} for q, a in ROWS]),
    "chats.jsonl": "\n".join(json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant",
                                                                                    "content": a}]}) for q, a in ROWS),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_people_have_is_read(name, tmp_path):
    lesson = from_pairs(write(tmp_path, name, GOOD[name]))
    assert all_pairs(lesson) == sorted(ROWS) and lesson.judged == "words right"
    assert lesson.name == name.partition(".")[0] and len(lesson.valid) == len(lesson.test) == 4


BROKEN = {      # file, what it holds -> what is said of it
    "one_column.csv": ("prompt\nhello\nworld\n", "one_column.csv has one column, or nothing in it: write "),
    "empty.csv": ("", "has one column, or nothing in it"),
    "one_row.csv": ("prompt,answer\nWho?,A king.\n", "has 1 different question: give at least 10"),
    "three_columns.csv": ("a1,b2,c3\n1,2,3\n", r"has 3 columns \(a1, b2, c3\), and it is not clear which are meant"),
    "loose_comma.csv": ("prompt,answer\n" + 12 * "Who, me?,A king.\n" + 20 * '"Who?","A king."\n',
                        r"line 2 of loose_comma.csv has 3 columns where most have 2 \(12 such lines\)"),
    "open_quote.csv": ("prompt,answer\n" + as_csv(ROWS[:3], head="") + 'Who?,"A king.\nWhat?,A garden.\n',
                       "line 5 of open_quote.csv is broken .*every quote that opens must close"),
    "after_a_long_cell.csv": ("prompt,answer\n" + 'Who?,"A king\nand a queen."\n' + "What?,A garden,a house.\n",
                              "line 4 of after_a_long_cell.csv has 3 columns where most have 2"),
    "quote_in_quotes.csv": ("prompt,answer\n" + 'Who?,"He said "no" to me."\n',
                            "line 2 of quote_in_quotes.csv is broken .*a quote inside quotes is written twice"),
    "spreadsheet.csv": (b"PK\x03\x04\0\0\0binary", "holds bytes that are no text"),
    "half_utf16.csv": (b"\xff\xfep", "begins like UTF-16 and breaks off: save it as UTF-8"),
    "only_empty.csv": ("prompt,answer\n" + 20 * ",\n" + 3 * "Who?,\n",
                       r"has 0 different questions \(3 rows with an empty side left out\)"),
    "all_the_same.csv": ("prompt,answer\n" + 30 * "Who?,A king.\n", r"has 1 different question \(29 rows there twice "
                         r"counted once\): give at least 10"),
    "book.xlsx": (b"PK", "book.xlsx is no file that can be read here: save it as .csv or .tsv"),
    "broken.jsonl": ('{"prompt": "a", "answer": "b"}\n{"prompt": \n', "line 2 of broken.jsonl is not JSON"),
    "no_answer.jsonl": ('{"prompt": "a", "reply": "b"}\n',
                        r"entry 1 of no_answer.jsonl has no prompt and answer in words \(it has prompt, reply\)"),
    "numbers.json": ("[1, 2]", r"entry 1 of numbers.json has no prompt and answer in words \(it has int\)"),
    "long_chat.jsonl": (json.dumps({"messages": [{"role": role, "content": "x"} for role in ("system", "user")]}),
                        "is a chat of system, user: give one user message and one assistant message"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_sentence(name, tmp_path):
    content, said = BROKEN[name]
    with pytest.raises(ValueError, match=said) as error:
        from_pairs(write(tmp_path, name, content))
    assert "\n" not in str(error.value) and len(str(error.value)) < 260


def test_no_file_is_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*mine.csv': give the path of a .csv or .tsv"):
        from_pairs(tmp_path / "mine.csv")


def test_accents_of_windows_are_read_and_said(tmp_path):
    rows = [(q, a.replace("everybody", "Zoë")) for q, a in ROWS]
    lesson = from_pairs(write(tmp_path, "old.csv", as_csv(rows), "cp1252"))
    assert all_pairs(lesson) == sorted(rows)
    assert lesson.notes == ("line 2 is not UTF-8: the file was read as Windows-1252, so look at its accents",)


def test_empty_rows_doubles_and_second_answers_are_counted_and_said(tmp_path):
    text = as_csv([*ROWS, *ROWS[:3], (ROWS[7][0], "Another answer."), ("", "An answer to nothing."), ("Who?", " ")])
    lesson = from_pairs(write(tmp_path, "mine.csv", text))
    assert lesson.notes == ("2 rows with an empty side left out", "3 rows there twice counted once",
                            "1 second answer to a question kept in the part of the first")
    assert len(all_pairs(lesson)) == 41 and "2 rows with an empty side" in repr(lesson)


def test_ten_megabytes_are_read_in_a_breath(tmp_path):
    rows = [(f"Question {n} " + "and so on " * 8, f"Answer {n * n} " + "it is " * 12) for n in range(60_000)]
    file = write(tmp_path, "large.csv", as_csv(rows))
    assert file.stat().st_size > 10e6
    began = time.perf_counter()
    lesson = from_pairs(file)
    assert time.perf_counter() - began < 20
    assert len(lesson.train) == 59_600 and len(lesson.valid) == len(lesson.test) == 200
    assert next(lesson.batches(load_pretrained()[1], 1))[0].shape[0] == 4, "and no more is tokenized than is used"


@pytest.mark.parametrize("seed", [0, 1])
def test_no_question_is_in_two_parts_and_the_seed_decides(seed):
    rows = ROWS + [(q, "Another answer, to the same question.") for q, _ in ROWS[::2]]
    lesson, again = from_pairs(rows, seed=seed), from_pairs(rows, seed=seed)
    parts = [{question for question, _ in part} for part in (lesson.train, lesson.valid, lesson.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert (lesson.train, lesson.valid, lesson.test) == (again.train, again.valid, again.test)
    assert lesson.test != from_pairs(rows, seed=seed + 5).test


def test_plain_text_becomes_pieces_without_a_question(tmp_path):
    paragraphs = [f"Paragraph {n}. " + "It goes on and on, as texts do. " * 12 for n in range(50)]
    lesson = from_pairs(write(tmp_path, "book.txt", "\n\n".join(paragraphs)))
    pieces = [answer for _, answer in all_pairs(lesson)]
    assert {question for question, _ in all_pairs(lesson)} == {""} and lesson.judge is None
    assert sorted("\n\n".join(pieces).split("\n\n")) == sorted(each.strip() for each in paragraphs)
    assert all(len(piece) < 1000 for piece in pieces) and len(pieces) < 30
    with pytest.raises(ValueError, match="book is plain text and has no answers to judge: look at the loss"):
        lesson.score(["x"])
    assert "Judged by" not in repr(lesson)


@pytest.mark.parametrize("answers, judged", [
    ([f"yes {n}" for n in range(20)], "answers right"), ([json.dumps({"n": n}) for n in range(20)], "fields right"),
    (["one two three four five"] * 20, "words right"), ([json.dumps([n]) for n in range(20)], "answers right")])
def test_how_an_answer_is_judged_follows_from_the_answers(answers, judged):
    lesson = from_pairs([(f"q {n}", answer) for n, answer in enumerate(answers)])
    assert lesson.judged == judged and lesson.score([a for _, a in lesson.test]) == 1.0


def test_the_scores_by_hand():
    assert fields_right('{"a": 1, "b": 2}', '{"a": 1, "b": 3, "c": 4}') == pytest.approx(1 / 3)
    assert fields_right('{"a": 1, "z": 2}', '{"a": 1}') == 0.5, "an invented field counts against it"
    assert fields_right('Sure! {"a": 1}', '{"a": 1}') == 0.0 and fields_right("[1]", '{"a": 1}') == 0.0
    assert words_right("The cat sat.", "the CAT ran away") == pytest.approx(2 * 2 / 7)
    assert words_right("", "a b") == 0.0 and words_right("a a", "a") == pytest.approx(2 / 3)


def test_the_floor_ignores_the_question():
    """Oracle: three answers, one of which is the commonest; whoever always gives it is right as often as it occurs."""
    rng = random.Random(0)
    rows = [(f"q {n}", rng.choice(["yes", "yes", "yes", "no"])) for n in range(300)]
    lesson = from_pairs(rows)
    assert lesson.constant == "yes"
    assert lesson.floor() == pytest.approx(sum(a == "yes" for _, a in lesson.test) / len(lesson.test))


def test_batches_pass_over_everything_and_are_the_same_again():
    tokenizer = load_pretrained()[1]
    lesson = from_pairs(ROWS)
    seen = [row for inputs, _ in lesson.batches(tokenizer, 8, seed=3, rows=4) for row in inputs.tolist()]
    assert len({tuple(row) for row in seen}) == len(lesson.train) == 32, "one pass is every pair once"
    first, again, other = (list(lesson.batches(tokenizer, 3, seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again))
    assert not all(a[0].shape == b[0].shape and torch.equal(a[0], b[0]) for a, b in zip(first, other))


def test_what_does_not_fit_is_counted_and_left_out():
    tokenizer = load_pretrained()[1]
    rows = [*ROWS[:20], *[(f"{n} " + "a very long question " * 30, "No.") for n in range(20)]]
    lesson = from_pairs(rows)
    said = lesson.lengths(tokenizer, 32)
    lost = sum(len(q) > 100 for q, _ in lesson.train)
    assert f"and {lost} of them are left out, because nothing of the answer remains" in said
    assert all((targets != -100).any(dim=1).all() for _, targets in lesson.batches(tokenizer, 20, longest=32))
    assert sum(len(inputs) for inputs, _ in lesson.heldout(tokenizer, longest=32)) == sum(
        len(q) < 100 for q, _ in lesson.valid)
    with pytest.raises(ValueError, match="no answer fits into 5 tokens behind its question"):
        next(lesson.batches(tokenizer, 1, longest=5))
    with pytest.raises(ValueError, match="no valid answer fits into 5 tokens behind its question"):
        lesson.heldout(tokenizer, longest=5)


def test_the_restaurants_are_the_bistros():
    lesson, tokenizer = lessons.restaurants(20), load_pretrained()[1]
    cards = bistro.cards("test", 200)
    ours, theirs = lesson.heldout(tokenizer, "test", 4), bistro.heldout(tokenizer, 4, split="test")
    assert [q for q, _ in lesson.test] == [bistro.in_words(card) for card in cards]
    assert torch.equal(ours[0][0][0, :20], theirs[0][0][0, :20])
    texts = [answer if i % 2 else "" for i, (_, answer) in enumerate(lesson.test)]
    assert lesson.score(texts) == pytest.approx(bistro.slot_accuracy(texts, cards).slots)


def test_the_orders_are_made_by_their_script(monkeypatch, tmp_path, capsys):
    from tools import orders
    monkeypatch.setattr(orders, "FILE", tmp_path / "orders.csv")
    orders.main()
    assert (tmp_path / "orders.csv").read_bytes() == ORDERS.read_bytes()
    lesson = lessons.orders()
    assert len(all_pairs(lesson)) == 400 and lesson.judged == "fields right" and lesson.notes == ()
    for guest, kitchen in all_pairs(lesson):
        said = json.loads(kitchen)
        assert list(said) == ["table", "order", "without"] and (said["without"] is None or said["without"] in guest)
        assert all(dish in guest for dish in said["order"])


def test_a_lesson_is_learned_and_scored():
    """Two hundred steps of a question that fable can answer: which of two words was in it."""
    model, tokenizer = load_pretrained()
    rng = random.Random(1)
    names = ["king", "queen"]
    rows = [(f"the {(name := rng.choice(names))} and {number} sons", f"a {name}") for number in range(200)]
    lesson = from_pairs(rows, "names")
    apply_lora(model, rank=4)
    before = evaluate(model, lesson.heldout(tokenizer, "test"))
    for _ in train(model, lesson.batches(tokenizer, 40, rows=8), 40, lr=1e-2):
        pass
    assert evaluate(model, lesson.heldout(tokenizer, "test")) < 0.3 < before
    assert lesson.score(lesson.answers(model, tokenizer)) > max(0.9, lesson.floor())
