import dataclasses
import json
from math import sqrt

import pytest

from welltuned.demo_score import KEYS, TicketScore, score
from welltuned.errors import InputError

TICKET = '{"product":"kettle","category":"defect","urgency":"normal","order":"55-2041","wants":"repair"}'
NO_ORDER = TICKET.replace('"55-2041"', "null")


def one(reply: str, expected: str = TICKET) -> TicketScore:
    return score([reply], [expected])


@pytest.mark.parametrize(
    "reply",
    [
        TICKET,
        f"\n  {TICKET} \n",
        json.dumps(json.loads(TICKET), indent=2),
        json.dumps(dict(reversed(json.loads(TICKET).items()))),
        TICKET.replace("kettle", "\\u006bettle"),
    ],
    ids=["same", "surrounding whitespace", "pretty-printed", "other key order", "escaped letter"],
)
def test_equal_tickets_are_right(reply: str) -> None:
    result = one(reply)
    assert (result.valid, result.fields, result.exact) == (1.0, 1.0, 1.0)
    assert result.per_field == dict.fromkeys(KEYS, 1.0)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "   ",
        "I am sorry to hear that.",
        "null",
        "5",
        '"kettle"',
        "{}",
        f"[{TICKET}]",
        f"Here is the ticket: {TICKET}",
        f"{TICKET} Anything else?",
        f"{TICKET}<|im_end|>",
        f"{TICKET}\n{TICKET}",
        f"```json\n{TICKET}\n```",
        TICKET[:-1],
        TICKET[:-1] + ",}",
        TICKET.replace('"', "'"),
        TICKET[:-1] + ',"note":null}',
        TICKET.replace(',"wants":"repair"', ""),
        TICKET.replace("wants", "want"),
        TICKET.replace("wants", "Wants"),
        TICKET[:-1] + ',"wants":"repair"}',
        TICKET.replace('"55-2041"', '{"number":"55-2041","number":"55-2041"}'),
        f'{{"ticket":{TICKET}}}',
        TICKET.replace('"55-2041"', "NaN"),
        TICKET.replace('"55-2041"', "None"),
        TICKET.replace('"55-2041"', "9" * 5000),
        TICKET.replace("kettle", "ket\ntle"),
        "[" * 100_000,
        '{"product":' * 100_000,
        "\ufeff" + TICKET,
        "\ud800",
    ],
    ids=lambda reply: repr(reply[-24:]),
)
def test_anything_but_one_whole_ticket_is_invalid(reply: str) -> None:
    result = one(reply)
    assert (result.valid, result.fields, result.exact) == (0.0, 0.0, 0.0)
    assert result.per_field == dict.fromkeys(KEYS, 0.0)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (TICKET.replace('"55-2041"', "552041"), TICKET.replace("55-2041", "552041")),
        (NO_ORDER.replace("null", '"null"'), NO_ORDER),
        (NO_ORDER.replace("null", '""'), NO_ORDER),
        (NO_ORDER.replace("null", "false"), NO_ORDER),
        (NO_ORDER, TICKET),
        (TICKET, NO_ORDER),
        (TICKET.replace('"55-2041"', '["55-2041"]'), TICKET),
        (TICKET.replace('"55-2041"', '{"number":"55-2041"}'), TICKET),
        (TICKET.replace("55-2041", " 55-2041"), TICKET),
        (TICKET.replace("55-2041", "#55-2041"), TICKET),
        (TICKET.replace("55-2041", "A7"), TICKET.replace("55-2041", "a7")),
    ],
)
def test_a_value_is_right_only_with_the_same_type_and_characters(reply: str, expected: str) -> None:
    result = one(reply, expected)
    assert (result.valid, result.fields, result.exact) == (1.0, 0.8, 0.0)
    assert result.per_field == {key: float(key != "order") for key in KEYS}


def test_shares_and_standard_errors_over_several_rows() -> None:
    result = score(
        [TICKET, TICKET.replace("repair", "refund").replace("kettle", "pan"), "no", NO_ORDER],
        [TICKET, TICKET, TICKET, NO_ORDER],
    )
    assert result.rows == 4
    assert result.valid == 0.75
    assert result.valid_se == pytest.approx(sqrt(0.75 * 0.25 / 4))
    assert result.exact == 0.5
    assert result.exact_se == pytest.approx(sqrt(0.5 * 0.5 / 4))
    assert result.fields == pytest.approx(13 / 20)
    shares = (1.0, 0.6, 0.0, 1.0)
    assert result.fields_se == pytest.approx(sqrt(sum((share - 0.65) ** 2 for share in shares) / 4 / 4))
    assert result.per_field == {"product": 0.5, "category": 0.75, "urgency": 0.75, "order": 0.75, "wants": 0.5}
    assert result.per_field_se["product"] == pytest.approx(0.25)
    assert result.per_field_se["order"] == pytest.approx(sqrt(0.75 * 0.25 / 4))


def test_standard_errors_shrink_with_the_square_root_of_the_rows() -> None:
    small = score([TICKET, "no"], [TICKET] * 2)
    large = score([TICKET, "no"] * 100, [TICKET] * 200)
    assert small.valid == large.valid == 0.5
    assert small.valid_se == pytest.approx(10 * large.valid_se)


def test_perfect_and_hopeless_scores_have_no_error() -> None:
    for reply in (TICKET, ""):
        result = score([reply] * 3, [TICKET] * 3)
        errors = [result.valid_se, result.fields_se, result.exact_se, *result.per_field_se.values()]
        assert errors == [0.0] * len(errors)


def test_a_score_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        one(TICKET).valid = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("replies", "expected", "message"),
    [
        ([], [], "no tickets"),
        ([TICKET], [TICKET, TICKET], "1 replies for 2 expected"),
        ([TICKET, TICKET], [TICKET, "{}"], "row 2"),
        ([TICKET], [TICKET.replace('"55-2041"', "5")], "row 1"),
    ],
)
def test_unusable_input_is_refused(replies: list[str], expected: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(replies, expected)
