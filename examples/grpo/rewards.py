"""What an answer to a sum is worth. `welltuned` calls `alone` and `right` by the names of their parameters."""


def alone(completion: str) -> float:
    """1 for a number and nothing else; partly for one among a few words, so that there is a way towards it."""
    text = completion.strip()
    if text.isdigit():
        return 1.0
    digits = sum(character.isdigit() for character in text)
    return 0.5 * digits / len(text) if text else 0.0


def right(completion: str, answer: str) -> float:
    """1 where the last number said is the sum."""
    numbers = "".join(c if c.isdigit() else " " for c in completion).split()
    return float(bool(numbers) and numbers[-1] == answer)
