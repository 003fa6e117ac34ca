"""The vLLM server that samples for a run of grpo, and whether it serves the model that is trained."""

from welltuned.advice.plan import Plan
from welltuned.errors import RunError
from welltuned.models.lora_settings import FROM_WEIGHTS, parse_init
from welltuned.models.vllm import VllmServer, serve_command

FARTHEST = 0.5  # nats a token between a server's log-probabilities and ours; rounding to bfloat16 makes about 0.01


def server_of(plan: Plan) -> VllmServer | None:
    """The server that samples, where the recipe names one."""
    url = plan.recipe.vllm_server_base_url
    return None if url is None else VllmServer(url)


def require_server(plan: Plan) -> None:
    """Raise InputError where the recipe names a server that does not answer, or takes shorter sequences."""
    server = server_of(plan)
    if server is not None:
        prompts, rows = plan.facts.dataset.prompts, plan.facts.dataset.length_max
        longest = plan.value("max_completion_length") + (rows if prompts is None else prompts.max)
        start = parse_init(plan.value("init_lora_weights"))
        twice = start is not None and start[0] in FROM_WEIGHTS  # as it is saved then
        rank = plan.value("r") * (2 if twice else 1)
        server.require(serve_command(plan.recipe.model, rank, longest), longest)


def require_near(gap: float) -> float:
    """Raise RunError where a server's log-probabilities are not those of this model."""
    if gap > FARTHEST:
        what = f"the vLLM server's log-probabilities are {gap:.2f} nats a token from this model's"
        raise RunError(f"{what}: it holds another base, or was started without --logprobs-mode processed_logprobs")
    return gap
