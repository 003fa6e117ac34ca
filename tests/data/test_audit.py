"""What the audit counts, on examples made by hand: every number can be checked by eye."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from welltuned.data.audit import Severity, audit, cut_sentence, propose
from welltuned.data.conversation import Kind, Policy
from welltuned.data.policies import (
    DEFAULT_POLICIES,
    KEPT_ORIGINS,
    Finding,
    bad_rows,
    sift_duplicates,
    sift_leaks,
    sift_length,
    sift_seen,
    together,
)
from welltuned.data.render import Example, Speaker
from welltuned.data.rows import all_rows
from welltuned.data.store import About, BadRow, StoreWriter, digest
from welltuned.errors import InputError

T, S, U, A = Speaker.TEMPLATE, Speaker.SYSTEM, Speaker.USER, Speaker.ASSISTANT


def example(prompt, answer, origin, found=(), end=True):
    """`T U.. T A.. A`: one id for each letter, the answer trained, and its end token with it."""
    ids = [1, *map(ord, prompt), 2, *map(ord, answer), 3]
    mask = [False] * (len(prompt) + 2) + [True] * len(answer) + [end]
    roles = [T, *[U] * len(prompt), T, *[A] * len(answer), A]
    return Example(
        np.array(ids, np.int32), np.array(mask), origin, roles=np.array(roles, np.uint8), found=frozenset(found)
    )


def rows_of(*examples):
    writer = StoreWriter()
    writer.add(examples, range(len(examples)), [digest(e.origin.encode()) for e in examples])
    writer.close()
    return all_rows([writer.store()])


def policies(**changes):
    return {**DEFAULT_POLICIES, **{Kind(kind): Policy(policy) for kind, policy in changes.items()}}


NOTHING = {kind: Finding(kind, policy) for kind, policy in DEFAULT_POLICIES.items()}
NONE = rows_of(example("q", "a", "none")).where(np.zeros(1, bool))


# ── counting ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sound_data_has_no_problems():
    result = audit(rows_of(example("abc", "de", "x:1"), example("q", "a", "x:2")), NONE, NOTHING)
    assert result.problems() == [] and result.cut is None
    assert (result.rows, result.tokens, result.supervised_tokens, result.end_trained) == (2, 13, 5, 2)
    assert result.share == 5 / 13
    shares = {speaker: (share.tokens, share.trained) for speaker, share in result.speakers.items()}
    assert shares[T] == (4, 0) and shares[U] == (4, 0) and shares[A] == (5, 5) and shares[S] == (0, 0)
    assert sum(tokens for tokens, _ in shares.values()) == result.tokens


def test_end_tokens_are_counted():
    found = [Kind.END_UNTRAINED]
    result = audit(rows_of(example("q", "a", "x:1"), example("r", "a", "x:2", found, end=False)), NONE, NOTHING)
    assert result.end_trained == 1 and result.rows == 2


def test_a_cut_is_counted_with_what_it_costs():
    rows = rows_of(*(example("q" * 10, "a" * n, f"x:{n}") for n in range(1, 101)))
    short = sift_length(rows, 40, DEFAULT_POLICIES)
    result = audit(short.rows, NONE, {**NOTHING, Kind.TOO_LONG: short.too_long})
    lengths = np.arange(1, 101) + 13
    assert result.tokens == np.minimum(lengths, 40).sum() and result.rows == 100
    cut = result.cut
    assert (cut.rows, cut.lose, cut.longest, cut.tokens) == (73, 73, 113, int((lengths - 40).clip(0).sum()))
    assert [(p.max_length, p.rows_cut) for p in cut.proposals] == [(112, 1), (120, 0)]
    assert cut.proposals[1].tokens_times == pytest.approx(lengths.sum() / result.tokens)
    [problem] = result.problems()
    assert problem.sentence == (
        "73 training rows are longer than max_length 40 and were cut: 73 of them lose trained tokens; 112 would cut 1, "
        "for 74.0% more tokens; 120 would cut none, for 74.0% more tokens"
    )
    assert problem.severity is Severity.WARNING


def test_rows_that_lose_nothing_they_learn_from():
    long_end = example("q", "a", "x:1")
    ids = np.concatenate([long_end.ids, np.full(20, 9, np.int32)])
    mask = np.concatenate([long_end.mask, np.zeros(20, bool)])
    rows = rows_of(Example(ids, mask, "x:1"), example("q", "bcd", "x:2"))
    result = audit(sift_length(rows, 10, DEFAULT_POLICIES).rows, NONE, NOTHING)
    assert (result.cut.rows, result.cut.lose) == (1, 0)
    assert "none of them loses a trained token" in result.problems()[0].sentence


def test_proposals_end_with_the_models_context():
    lengths = np.array([10] * 90 + [100] * 9 + [5000])
    assert [p.max_length for p in propose(lengths, 50, 1000, None)] == [104, 5000]
    assert [(p.max_length, p.rows_cut) for p in propose(lengths, 50, 1000, 2048)] == [(104, 1), (2048, 1)]
    assert propose(lengths, 2048, 1000, 2048) == ()
    rows = rows_of(example("q", "a" * 100, "x:1"), example("q", "a", "x:2")).within(20)
    sentence = cut_sentence(audit(rows, NONE, NOTHING, context=20).cut)
    assert "max_length 20 (the model's context is 20)" in sentence and sentence.endswith("the longest has 104 tokens")


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=60), st.integers(2, 1500))
def test_proposals_cut_less_and_say_what_is_so(lengths, limit):
    lengths = np.array(lengths)
    now = int(np.minimum(lengths, limit).sum())
    for proposal in propose(lengths, limit, now, None):
        assert proposal.max_length > limit and proposal.max_length % 8 == 0
        assert proposal.rows_cut == (lengths > proposal.max_length).sum() <= max(0.05 * len(lengths), 0)
        assert proposal.tokens_times == pytest.approx(np.minimum(lengths, proposal.max_length).sum() / now)


def test_json_is_complete():
    rows = rows_of(example("q", "a" * 50, "x:1"), example("q", "a", "x:2"))
    short = sift_length(rows, 20, DEFAULT_POLICIES)
    plain = json.loads(json.dumps(audit(short.rows, NONE, {**NOTHING, Kind.TOO_LONG: short.too_long}).to_json()))
    assert plain["found"].keys() == {str(kind) for kind in Kind}
    assert plain["found"]["too_long"] == {
        "policy": "keep", "rows": 1, "of": 2, "done": "cut", "dropped": 0, "origins": [["x:1", "54 tokens"]],
    }  # fmt: skip
    assert plain["speakers"]["assistant"] == {"tokens": 19, "trained": 19} and plain["cut"]["rows"] == 1
    assert plain["problems"][0]["severity"] == "warning" and plain["share"] == round(19 / 25, 4)


# ── what rendering saw ───────────────────────────────────────────────────────────────────────────────────────────────

SEEN = [Kind.END_UNTRAINED, Kind.LOST_THINKING, Kind.BAD_ENCODING, Kind.CONTROL_TOKEN, Kind.REPEATED_TURN,
        Kind.EMPTY_TURN]  # fmt: skip


@pytest.mark.parametrize("kind", SEEN)
def test_each_policy_for_each_kind(kind):
    rows = rows_of(example("q", "a", "x:1"), example("r", "b", "x:2", [kind]), example("s", "c", "x:3", [kind]))
    kept, findings = sift_seen(rows, policies(**{kind: "keep"}))
    [finding] = [f for f in findings if f.rows]
    assert len(kept) == 3 and (finding.kind, finding.rows, finding.of, finding.done) == (kind, 2, 3, "kept")
    assert [origin for origin, _ in finding.named] == ["x:2", "x:3"]
    left, findings = sift_seen(rows, policies(**{kind: "drop"}))
    [finding] = [f for f in findings if f.rows]
    assert [e.origin for e in left] == ["x:1"] and (finding.dropped, finding.done) == (2, "left out")
    with pytest.raises(InputError, match=rf"x:2: .*\(2 such rows\); .*, or set on_{kind} to drop or keep"):
        sift_seen(rows, policies(**{kind: "error"}))
    [problem] = audit(kept, NONE, {**NOTHING, kind: finding}).problems()
    assert problem.sentence.startswith("2 of 3 rows ") and problem.sentence.endswith(
        f"; left out (on_{kind}): x:2, x:3"
    )


def test_untrained_rows_are_an_error_by_default_and_never_kept():
    bare = example("q", "a", "x:2", [Kind.UNTRAINED])
    rows = rows_of(example("q", "a", "x:1"), Example(bare.ids, bare.mask & False, "x:2", found=bare.found))
    with pytest.raises(InputError, match="x:2: none of the row's tokens is trained; see what the chat template"):
        sift_seen(rows, DEFAULT_POLICIES)
    left, findings = sift_seen(rows, policies(untrained="drop"))
    assert len(left) == 1 and findings[0].dropped == 1
    result = audit(left, NONE, {**NOTHING, Kind.UNTRAINED: findings[0]})
    assert "1 of 2 rows have no trained token" in result.problems()[0].sentence


def test_a_row_with_two_defects_counts_for_both():
    rows = rows_of(example("q", "a", "x:1", [Kind.EMPTY_TURN, Kind.BAD_ENCODING]))
    left, findings = sift_seen(rows, policies(empty_turn="drop"))
    assert len(left) == 0 and {f.kind: f.rows for f in findings if f.rows} == {Kind.EMPTY_TURN: 1, Kind.BAD_ENCODING: 1}


def test_bad_rows_are_listed_from_what_was_read():
    about = About(rows=7, bad=(BadRow("x:3", "`messages` is null", "write some"),), bad_rows=1)
    finding = bad_rows([about, About(rows=2)], Policy.DROP)
    assert (finding.rows, finding.of, finding.dropped) == (1, 10, 1) and finding.named == (
        ("x:3", "`messages` is null"),
    )
    with pytest.raises(InputError, match="x:3: `messages` is null; write some"):
        bad_rows([about], Policy.ERROR)
    [problem] = audit(rows_of(example("q", "a", "x:1")), NONE, {**NOTHING, Kind.BAD_ROW: finding}).problems()
    assert problem.sentence == (
        "1 of 10 rows cannot be read as conversations; left out (on_bad_row): x:3 (`messages` is null)"
    )


# ── rows beside each other ───────────────────────────────────────────────────────────────────────────────────────────


def test_duplicates():
    rows = rows_of(*(example("q", answer, f"x:{i}") for i, answer in enumerate("abacab")))
    kept, finding = sift_duplicates(rows, Policy.KEEP)
    assert len(kept) == 6 and finding.named == (("x:2", "as x:0"), ("x:4", "as x:0"), ("x:5", "as x:1"))
    left, finding = sift_duplicates(rows, Policy.DROP)
    assert [e.origin for e in left] == ["x:0", "x:1", "x:3"] and finding.dropped == 3
    with pytest.raises(InputError, match=r"x:2: the row repeats an earlier training row \(as x:0\) \(3 such rows\)"):
        sift_duplicates(rows, Policy.ERROR)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60))
def test_duplicates_are_what_a_dictionary_finds(numbers):
    rows = rows_of(*(example("q", chr(97 + n), f"{i}") for i, n in enumerate(numbers)))
    first, expected = {}, []
    for i, n in enumerate(numbers):
        if n in first:
            expected.append((str(i), f"as {first[n]}"))
        first.setdefault(n, i)
    left, finding = sift_duplicates(rows, Policy.DROP)
    assert list(finding.named) == expected and [int(e.origin) for e in left] == sorted(first.values())


def test_leaks_of_rows_and_of_prompts():
    train = rows_of(
        example("r", "b", "t:1"), example("q", "a", "t:2"), example("q", "x", "t:3"), example("n", "n", "t:4")
    )
    held = rows_of(example("r", "other", "h:1"), example("new", "a", "h:2"), example("q", "x", "h:3"))
    kept, finding = sift_leaks(train, held, Policy.KEEP)
    assert len(kept) == 4 and (finding.rows, finding.of, finding.dropped) == (2, 3, 0)
    assert finding.named == (("h:1", "as t:1"), ("h:3", "as t:3"))
    left, finding = sift_leaks(train, held, Policy.DROP)
    assert [e.origin for e in left] == ["t:4"] and (finding.rows, finding.dropped) == (2, 3)
    [problem] = audit(left, held, {**NOTHING, Kind.LEAK: finding}).problems()
    assert "2 of 3 held-out rows are also found in the training data (they repeat a training row" in problem.sentence
    assert "the training rows are left out (on_leak): h:1 (as t:1), h:3 (as t:3)" in problem.sentence
    with pytest.raises(InputError, match="h:1: the held-out row repeats a training row or its prompt"):
        sift_leaks(train, held, Policy.ERROR)
    assert sift_leaks(train, NONE, Policy.ERROR)[1].rows == 0


def test_rows_without_a_prompt_leak_only_when_they_are_equal():
    def text(words, origin):
        ids = np.array([1, *map(ord, words)], np.int32)
        mask = np.arange(len(ids)) > 0
        return Example(ids, mask, origin)

    train = rows_of(text("abc", "t:1"), text("abd", "t:2"))
    _, finding = sift_leaks(train, rows_of(text("xyz", "h:1"), text("abd", "h:2")), Policy.KEEP)
    assert finding.named == (("h:2", "as t:2"),)


# ── length ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_too_long_is_cut_left_out_or_an_error():
    rows = rows_of(example("q", "a" * 9, "x:1"), example("q", "a" * 30, "x:2"))
    short = sift_length(rows, 20, DEFAULT_POLICIES)
    assert [len(e.ids) for e in short.rows] == [13, 20] and (short.too_long.rows, short.too_long.dropped) == (1, 0)
    short = sift_length(rows, 20, policies(too_long="drop"))
    assert [e.origin for e in short.rows] == ["x:1"] and short.too_long.dropped == 1
    [problem] = audit(short.rows, NONE, {**NOTHING, Kind.TOO_LONG: short.too_long}).problems()
    assert problem.sentence == (
        "1 of 2 training rows are longer than max_length; left out (on_too_long): x:2 (34 tokens)"
    )
    with pytest.raises(InputError, match=r"x:2: the row is longer than max_length \(34 tokens\)"):
        sift_length(rows, 20, policies(too_long="error"))
    assert sift_length(rows, 34, policies(too_long="error")).too_long.rows == 0


def test_a_row_that_loses_its_whole_answer_is_untrained():
    rows = rows_of(example("q", "abc", "x:1"), example("q" * 30, "a", "x:2"), example("q" * 18, "a", "x:3"))
    with pytest.raises(InputError, match="x:2: none of the row's tokens is trained: cut to max_length 20 it loses"):
        sift_length(rows, 20, DEFAULT_POLICIES)
    short = sift_length(rows, 20, policies(untrained="drop"))
    assert [e.origin for e in short.rows] == ["x:1"]
    assert (short.too_long.rows, short.untrained.rows, short.untrained.dropped) == (2, 2, 2)
    assert sift_length(rows, 21, policies(untrained="drop")).untrained.rows == 1  # one token of the third's is left


def test_long_lists_are_shortened_and_their_number_is_not():
    rows = rows_of(*(example("q", "a", f"x:{i}") for i in range(KEPT_ORIGINS + 11)))
    _, finding = sift_duplicates(rows, Policy.KEEP)
    assert finding.rows == KEPT_ORIGINS + 10 and len(finding.named) == KEPT_ORIGINS
    [problem] = audit(rows, NONE, {**NOTHING, Kind.DUPLICATE: finding}).problems()
    assert problem.sentence.endswith("x:5 (as x:0) and 1,005 more") and problem.severity is Severity.WARNING
    assert together(finding, finding).rows == 2 * finding.rows and len(together(finding, finding).named) == KEPT_ORIGINS


def test_few_duplicates_are_a_note():
    rows = rows_of(*(example("q", chr(200 + i), f"x:{i}") for i in range(200)), example("q", chr(200), "x:200"))
    _, finding = sift_duplicates(rows, Policy.KEEP)
    assert audit(rows, NONE, {**NOTHING, Kind.DUPLICATE: finding}).problems()[0].severity is Severity.NOTE


def test_the_gravest_comes_first():
    findings = {kind: Finding(kind, Policy.KEEP, 5, 10, 0, (("x:1", ""),)) for kind in Kind}
    rows = rows_of(example("q", "a" * 50, "x:1"), example("q", "a", "x:2")).within(20)
    weights = [problem.weight for problem in audit(rows, NONE, findings).problems()]
    assert weights == sorted(weights, reverse=True) and len(weights) == len(Kind)  # the cut is that of TOO_LONG
