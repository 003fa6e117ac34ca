"""How long an example may be: as long as the longest, unless memory or the model's context is less."""

from welltuned.advice.epoch import Epoch
from welltuned.advice.rules import cited
from welltuned.advice.settle import counted
from welltuned.choice import Choice
from welltuned.facts.data import DatasetFacts
from welltuned.recipe import Method


def choose_max_length(method: Method, data: DatasetFacts, epoch: Epoch, advised: int, whole: int, cut: int) -> Choice:
    """`advised` tokens; `whole` would cut nothing that the context holds; `cut` is the limit that is in force."""
    share = data.share_longer_than(cut)
    noun = "pair" if epoch.sequences > 1 else "row"
    if method is Method.GRPO:
        answer = epoch.longest - data.length_max
        room = f"your longest prompt has {data.length_max:,} tokens and answers may have {answer:,}"
    else:
        room = f"the longest has {data.length_max:,} tokens"
    if advised >= epoch.longest:
        sound = f"none of {counted(data.rows, noun)} is cut: {room}"
        why = f"{room}: nothing is cut" if method is Method.GRPO else sound
    elif method is Method.GRPO:
        why = f"{room}: what is longer is cut"
    else:
        why = f"about {share:.0%} of your {counted(data.rows, noun)} are cut, since {room}"
    low = min(epoch.typical, advised)
    evidence = cited("packing", "length_step")
    return Choice(value=advised, low=low, high=max(advised, whole), reason=why, evidence=evidence)
