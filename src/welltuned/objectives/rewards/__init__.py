"""What rewards a completion: functions of the user's by path, and built-in ones. `call` says how they are asked."""

from welltuned.objectives.rewards.call import (
    BUILT_IN,
    Fault,
    Judged,
    Reward,
    Scores,
    load_rewards,
    require_columns,
    score,
)

__all__ = ["BUILT_IN", "Fault", "Judged", "Reward", "Scores", "load_rewards", "require_columns", "score"]
