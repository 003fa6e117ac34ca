"""Reinforcement learning in groups: an update samples, has its completions rewarded, and follows what they teach.

Sampling uses the model as it is at that update, in this process, or a vLLM server that is given the adapter as it is.
Log-probabilities of the policy that sampled are those of the training forward pass, not the sampler's, so that every
ratio of the first iteration is exactly 1; how far another engine's are from them is measured, and corrected for.

Several ranks sample and reward whole groups each, and tell each other what came of it: advantages and weights are those
of the whole update on all of them, and each follows its own groups.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from welltuned.data.prompts import Prompt
from welltuned.kernels.lora import mixed
from welltuned.models.generate import stop_ids
from welltuned.models.lora import AdapterBank
from welltuned.models.packed import shares
from welltuned.models.sample import Completion, Sampling, complete
from welltuned.models.vllm import VllmServer
from welltuned.objectives.completions import Group, cut, lay, token_logprobs
from welltuned.objectives.grpo import (
    GrpoSettings,
    LossType,
    PolicyLoss,
    Scale,
    advantages,
    policy_loss,
    token_weights,
)
from welltuned.objectives.rewards import Fault, Judged, Reward, Scores, score
from welltuned.training.grpo_answers import Answered, Sampled, together
from welltuned.training.grpo_measures import lengths, measures_of, per_reward
from welltuned.training.grpo_server import require_near, server_of
from welltuned.training.prepare import Prepared
from welltuned.training.step import Engine, Evaluation, Gradient, NotFinite

SHOWN_FAULTS = 5  # faults of one reward that are told one by one; all are counted
KEPT_SAMPLES = 8  # held-out completions that an evaluation keeps
SAMPLING_TOKENS = 8  # completions sampled at a time have this many times a micro-batch's tokens: a cache holds less


def grpo_objective(prepared: Prepared, engine: Engine) -> "Grpo":
    """The objective of a prepared run."""
    value = prepared.plan.value
    settings = GrpoSettings(
        loss_type=LossType(value("loss_type")),
        max_completion_length=value("max_completion_length"),
        epsilon=value("epsilon"),
        epsilon_high=value("epsilon_high"),
        beta=value("beta"),
        scale_rewards=Scale(value("scale_rewards")),
        mask_truncated_completions=value("mask_truncated_completions"),
    )
    sampling = Sampling(
        max_new_tokens=value("max_completion_length"),
        temperature=value("temperature"),
        top_p=value("top_p"),
        stop_ids=tuple(stop_ids(engine.model, prepared.tokenizer)),
        tokens_at_once=SAMPLING_TOKENS * value("token_budget"),
    )
    objective = Grpo(
        settings,
        sampling,
        prepared.rewards,
        prepared.tokenizer,
        generations=value("num_generations"),
        iterations=value("num_iterations"),
        whole_budget=engine.token_budget,
        server=server_of(prepared.plan),
        clip=value("vllm_importance_sampling_clip_max") if prepared.recipe.vllm_server_base_url else math.inf,
    )
    objective.remember_start(engine)  # now, before a checkpoint may be restored
    return objective


class Grpo:
    """The objective of `method: grpo`; its rows are prompts.

    Args:
        generations: completions of each prompt.
        iterations: updates that are made of one set of completions. Calls after the first use the set again, so the
            caller must ask for the same rows; a run that goes on within a set samples it anew.
        whole_budget: the engine's token budget for which `sampling.tokens_at_once` was chosen; with a smaller one
            fewer completions are sampled at a time. None: always as many.
        server: samples in the model's place. clip: the most that a token counts because it drew it too rarely.
    """

    def __init__(
        self,
        settings: GrpoSettings,
        sampling: Sampling,
        rewards: Sequence[Reward],
        tokenizer: PreTrainedTokenizerBase,
        *,
        generations: int,
        iterations: int = 1,
        whole_budget: int | None = None,
        server: VllmServer | None = None,
        clip: float = math.inf,
    ):
        self._server, self._clip = server, clip
        self._whole_budget = whole_budget
        self.settings, self.sampling, self.rewards, self.tokenizer = settings, sampling, tuple(rewards), tokenizer
        self.generations, self.iterations = generations, iterations
        self._sampled: Sampled | None = None
        self._used_by: tuple[tuple[int, ...], ...] = ()  # the keys of each update that used the set
        self._told: dict[str, int] = {}
        self._start: Tensor | None = None

    # ── an update ──

    def accumulate_gradient(self, engine: Engine, rows: Sequence[Prompt], keys: Sequence[int]) -> Gradient:
        """Sample, reward and add the gradient. A group without signal adds exactly nothing, and is not computed."""
        self.remember_start(engine)
        sampled = self._set_for(engine, rows, tuple(keys))
        started = time.perf_counter()
        loss, measures = self._follow(engine, sampled)
        measures["seconds/update"] = time.perf_counter() - started
        if len(self._used_by) == 1:
            measures |= sampled.seconds
        if not engine.ranks.is_first:  # sums over the ranks: the first one's time, and what all know once
            measures |= {name: 0.0 for name in measures if name.startswith("seconds/")}
        known = sampled.measures if engine.ranks.is_first else dict.fromkeys(sampled.measures, 0.0)
        return Gradient(
            loss=loss,
            tokens=sampled.tokens,
            supervised_tokens=sampled.supervised_tokens,
            measures={**known, **measures},
            notes=sampled.notes if len(self._used_by) == 1 else (),
        )

    def _set_for(self, engine: Engine, rows: Sequence[Prompt], keys: tuple[int, ...]) -> Sampled:
        """The set of completions that an update follows: the same for as many updates as `iterations` says.

        A call by the same keys is one that is made again, for want of memory here or to find a row at fault: it has the
        same set. So this is decided alike on all ranks, without a word between them.
        """
        known, origins = self._sampled, tuple(row.origin for row in rows)
        again = bool(self._used_by) and self._used_by[-1] == keys
        if known is None or known.origins != origins or not (again or len(self._used_by) < self.iterations):
            self._sampled, self._used_by = None, ()  # the policy's as it was, which may not outlive a failure to sample
            known = self._sampled = self._sample(engine, rows, keys)
        if not again or not self._used_by:
            self._used_by = (*self._used_by, keys)
        return known

    def _sample(self, engine: Engine, rows: Sequence[Prompt], keys: Sequence[int]) -> Sampled:
        names = [[name_of(key, g) for g in range(self.generations)] for key in keys]
        answered = self._answered(engine, rows, names, self.sampling)
        return self._prepared(rows, keys, answered)

    def _answered(
        self, engine: Engine, rows: Sequence[Prompt], names: Sequence[Sequence[int]], sampling: Sampling
    ) -> Answered:
        """A completion for each name of each row, with their rewards; each rank makes those of its share."""
        lengths = [len(row.ids) + len(group) * sampling.max_new_tokens for row, group in zip(rows, names, strict=True)]
        mine = engine.ranks.share(lengths)

        def make() -> Answered:
            started = time.perf_counter()
            some = [rows[i] for i in mine]
            made = self._complete(engine, some, [names[i] for i in mine], sampling)
            sampled = time.perf_counter()
            scores = self._score([(row, c) for row, group in zip(some, made, strict=True) for c in group])
            seconds = {"seconds/generation": sampled - started, "seconds/reward": time.perf_counter() - sampled}
            return Answered(tuple(mine), made, scores, seconds)

        return together(engine.ranks.gather(make), mine)

    def _prepared(self, rows: Sequence[Prompt], keys: Sequence[int], answered: Answered) -> Sampled:
        made, scores = answered.made, answered.scores
        settings = self.settings
        reward_PG = torch.tensor(scores.total, dtype=torch.float64).view(len(rows), self.generations)
        found = advantages(reward_PG, settings.scale_rewards)
        every = [c for group in made for c in group]
        lengths_S = torch.tensor([len(c.ids) for c in every])
        kept_S = torch.tensor([c.ended or not settings.mask_truncated_completions for c in every])
        counted_S = torch.where(kept_S, lengths_S, 0)
        advantage_S = found.value_PG.flatten()
        pulls_S = kept_S & ((advantage_S != 0) | (settings.beta > 0))
        groups = []
        for p in answered.rows:
            numbers = [s for s in range(p * self.generations, (p + 1) * self.generations) if pulls_S[s]]
            if numbers:
                groups.append(Group(rows[p].ids, tuple(every[s].ids for s in numbers), keys[p], tuple(numbers)))
        return Sampled(
            groups=tuple(groups),
            advantage_S=advantage_S,
            weight_S=token_weights(counted_S, settings),
            tokens=self.generations * sum(len(row.ids) for row in rows) + int(lengths_S.sum()),
            supervised_tokens=int(counted_S.sum()),
            pulling=int(lengths_S[pulls_S].sum()),
            origins=tuple(row.origin for row in rows),
            measures=measures_of(every, reward_PG, found.std_P, found.silent_P, scores),
            notes=self._fault_notes(scores.faults),
            seconds=answered.seconds,
            sampler={s: torch.from_numpy(c.logprobs) for s, c in enumerate(every) if c.logprobs is not None},
        )

    def _follow(self, engine: Engine, sampled: Sampled) -> tuple[float, dict[str, float]]:
        """Add the gradient of one iteration; (loss, measures)."""
        batches = cut(sampled.groups, engine.token_budget, shares(engine.model))
        if self.settings.beta > 0 and not sampled.reference:
            self._ask_reference(engine, batches, sampled)
        parts: list[PolicyLoss] = []
        apart: list[Tensor] = []
        for batch in batches:
            found = self._batch_loss(engine, batch, sampled, apart)
            found.value.backward()
            parts.append(PolicyLoss(found.value.detach(), found.kl, found.clipped))
        loss = torch.stack([part.value.double() for part in parts]).tolist() if parts else []
        kl, clipped = float(sum(part.kl for part in parts)), float(sum(part.clipped for part in parts))
        for batch, value in zip(batches, loss, strict=True):
            if not math.isfinite(value):
                names = ", ".join(dict.fromkeys(self._origin(sampled, group) for group in batch))
                raise NotFinite(f"the loss is not finite in {names}; lower the learning rate or look at the rows")
        tokens = max(1, sampled.supervised_tokens)
        measures = {"clip_ratio": clipped / tokens}
        if self.settings.beta > 0:
            measures["kl"] = kl / tokens
        if self._server is not None:
            gap_M = torch.cat(apart) if apart else torch.zeros(1)
            require_near(float(gap_M.mean()))
            measures["sampler_gap"] = float(gap_M.sum()) / max(1, sampled.pulling)
        return math.fsum(loss), measures

    def _batch_loss(self, engine: Engine, batch: Sequence[Group], sampled: Sampled, apart: list[Tensor]) -> PolicyLoss:
        """`apart` is given how far another sampler's log-probabilities are from ours, a number a token."""
        laid = lay(batch, shared=shares(engine.model), device=engine.model.device)
        engine.trained.use_rows(None, laid.spans)
        logprob_M = token_logprobs(engine.model, engine.head, laid, self.sampling.temperature)
        numbers = [s for group in batch for s in group.sequences]
        if numbers[0] not in sampled.old:  # the first iteration: this is the policy that sampled
            old_M = logprob_M.detach()
            if self.iterations > 1:
                sampled.old.update(_by_sequence(old_M, batch))
        else:
            old_M = torch.cat([sampled.old[s] for s in numbers])
        ref_M = torch.cat([sampled.reference[s] for s in numbers]) if sampled.reference else None
        device = logprob_M.device
        correction_M = None
        if sampled.sampler:
            above_M = old_M - torch.cat([sampled.sampler[s] for s in numbers]).to(old_M)
            apart.append(above_M.abs())
            correction_M = above_M.exp().clamp_max(self._clip)
        return policy_loss(
            *(logprob_M, old_M, ref_M, laid.sequence_M),
            *(sampled.advantage_S.to(device), sampled.weight_S.to(device), self.settings, correction_M),
        )

    @torch.no_grad()
    def _ask_reference(self, engine: Engine, batches: Sequence[Sequence[Group]], sampled: Sampled) -> None:
        with self._at_start(engine):
            for batch in batches:
                laid = lay(batch, shared=shares(engine.model), device=engine.model.device)
                ref_M = token_logprobs(engine.model, engine.head, laid, self.sampling.temperature)
                sampled.reference.update(_by_sequence(ref_M, batch))

    def remember_start(self, engine: Engine) -> None:
        """A bank keeps its own start; of all of a model a copy is needed, where there is a pull to it."""
        if self._start is None and self.settings.beta > 0:
            trained = engine.trained
            self._start = trained.start_KP if isinstance(trained, AdapterBank) else trained.flat_KP.clone()

    @contextmanager
    def _at_start(self, engine: Engine) -> Iterator[None]:
        """Within the block the model is as it was before the first update, and nothing is dropped."""
        assert self._start is not None
        engine.trained.no_dropout()
        flat_KP = engine.trained.flat_KP
        now_KP = flat_KP.clone()
        flat_KP.copy_(self._start)
        try:
            yield
        finally:
            flat_KP.copy_(now_KP)

    def _origin(self, sampled: Sampled, group: Group) -> str:
        return sampled.origins[group.sequences[0] // self.generations]

    # ── completions and rewards ──

    def _complete(
        self, engine: Engine, rows: Sequence[Prompt], names: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        if self._server is not None:
            assert isinstance(engine.trained, AdapterBank)
            return self._server.complete(engine.trained, [row.ids for row in rows], names, sampling)
        engine.trained.no_dropout()
        if self._whole_budget is not None:  # where memory was short, in smaller batches
            at_once = sampling.tokens_at_once * engine.token_budget // self._whole_budget
            sampling = replace(sampling, tokens_at_once=at_once)
        return complete(engine.model, engine.head, [row.ids for row in rows], names, sampling)

    def _score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> Scores:
        return score(self.rewards, [self._judged(row, completion) for row, completion in pairs])

    def _judged(self, row: Prompt, completion: Completion) -> Judged:
        return Judged(
            completion=self._text(completion),
            prompt=row.messages[-1].content,
            messages=[message.to_template() for message in row.messages],
            answer=row.answer,
            row=row.row,
            origin=row.origin,
        )

    def _text(self, completion: Completion) -> str:
        ids = completion.ids[:-1] if completion.ended else completion.ids
        text: str = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return text

    def _fault_notes(self, faults: Sequence[Fault]) -> tuple[str, ...]:
        """The first faults of each reward in words; all are counted in `reward_faults`."""
        notes = []
        for fault in faults:
            count = self._told[fault.reward] = self._told.get(fault.reward, 0) + 1
            if count <= SHOWN_FAULTS:
                more = "; later ones are only counted (reward_faults)" if count == SHOWN_FAULTS else ""
                notes.append(
                    f"reward {fault.reward} failed on a completion of {fault.origin}: {fault.what}; "
                    f"that completion is left out{more}"
                )
        return tuple(notes)

    # ── held-out prompts ──

    @torch.no_grad()
    def evaluate(self, engine: Engine, rows: Sequence[Prompt]) -> Evaluation:
        """Mean reward of greedy completions, one a prompt; `loss` is minus that, so that lower is better as elsewhere.

        Greedy, so that nothing but the weights tells two evaluations apart: they are paired by prompt.
        """
        self.remember_start(engine)
        greedy = Sampling(
            max_new_tokens=self.sampling.max_new_tokens,
            temperature=0.0,
            stop_ids=self.sampling.stop_ids,
            tokens_at_once=self.sampling.tokens_at_once,
        )
        answered = self._answered(engine, rows, [[0]] * len(rows), greedy)
        made, scores = [group[0] for group in answered.made], answered.scores
        known = torch.tensor([value for value in scores.total if not math.isnan(value)], dtype=torch.float64)
        mean = float(known.mean()) if len(known) else math.nan
        error = float(known.std() / math.sqrt(len(known))) if len(known) > 1 else math.nan
        measures = {"eval_reward": mean, "eval_reward_se": error}
        measures |= {f"eval_{name}": value for name, value in per_reward(scores).items()}
        measures |= {f"eval_{name}": value for name, value in lengths(made).items()}
        return Evaluation(
            loss=-mean,
            standard_error=error,
            supervised_tokens=sum(len(c.ids) for c in made),
            loss_of_example=tuple(-value for value in scores.total),
            measures=measures,
            samples=tuple(self._shown(rows[i], made[i], scores, i) for i in range(min(KEPT_SAMPLES, len(rows)))),
            notes=self._fault_notes(scores.faults),
        )

    def _shown(self, row: Prompt, completion: Completion, scores: Scores, index: int) -> dict[str, Any]:
        return {
            "row": row.origin,
            "prompt": row.messages[-1].content,
            "completion": self._text(completion),
            "stopped": "by its end token" if completion.ended else "at max_completion_length",
            "answer": row.answer,
            "reward": scores.total[index],
            "rewards": {name: values[index] for name, values in scores.each.items()},
        }


def name_of(key: int, number: int) -> int:
    """Names the random numbers of a prompt's completion: `key` is that of the prompt in this update."""
    return mixed(key * 0x9E3779B97F4A7C15 + number)


def _by_sequence(value_M: Tensor, batch: Sequence[Group]) -> dict[int, Tensor]:
    """The tokens' values by completion."""
    pairs = [(s, len(ids)) for group in batch for s, ids in zip(group.sequences, group.completions, strict=True)]
    parts = value_M.split([n for _, n in pairs])
    return {s: part for (s, _), part in zip(pairs, parts, strict=True)}
