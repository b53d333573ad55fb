"""What a user of imported weights must know about them, because the files do not hold it."""

from typing import Any

from tipl.policy import ACTIVATIONS, PolicySpec
from tipl.storing.actor_families import RUNNING_STATISTICS, STATISTICS, Settings, match, normaliser_of
from tipl.storing.foreign_actors import Actor


def activation_missing(policy: PolicySpec) -> str:
    """Return what to say where nothing says the activation of a policy, which has its library's default for now."""
    return (
        f"activation must be given, one of {', '.join(ACTIVATIONS)}, as nothing says which lies between the layers; "
        f"the library's default is {policy.activation}"
    )


def source_record(actor: Actor, file_format: str, *notes: str) -> dict[str, Any]:
    """Return the config's entry "source", plain JSON, with a note of everything that a user of the store must know."""
    record: dict[str, Any] = {"format": file_format, "actor": actor.to_dict()}
    all_notes = [note for note in notes if note]
    is_discrete = isinstance(actor.policy, PolicySpec) and actor.policy.discrete
    if actor.kind == "cleanrl" and not actor.normaliser and not is_discrete:
        all_notes.append(
            "CleanRL does not save the statistics with which it normalised observations: in the simulator these "
            "policies do not reach the returns that they had"
        )
    elif actor.normaliser not in ("", STATISTICS):
        all_notes.append("the observation normaliser of each checkpoint is folded into its first layer")
        if clip := normaliser_of(actor.normaliser).clip:
            all_notes.append(f"what it clips, observations beyond {clip:g} standard deviations, is not clipped")
    if isinstance(actor.policy, PolicySpec):
        all_notes += _unsaid(actor, actor.policy)
    else:
        all_notes.append(_not_run(actor))
    return record | ({"note": "; ".join(dict.fromkeys(all_notes))} if all_notes else {})


def _unsaid(actor: Actor, policy: PolicySpec) -> list[str]:
    """Return what is taken to be so of an actor's actions, because its library's files do not say it."""
    notes = []
    if actor.kind == "rl_games" and not policy.discrete:
        notes.append(
            "actions are taken to be clipped to [-1, 1] and rescaled to the action space, as rl_games does by default "
            "(clip_actions)"
        )
    if actor.kind in ("skrl", "flax") and not policy.discrete:
        notes.append(
            "nothing says what becomes of the network's output: actions are taken to be the output itself, clipped to "
            "the action space"
        )
    if actor.kind == "skrl" and not actor.normaliser and not actor.keys[0].startswith("policy."):
        notes.append(
            "the files hold skrl's policy alone: observations are taken to be as the environment gives them; where a "
            "preprocessor normalised them, import the files of the whole agent"
        )
    if actor.kind == "torchrl" and not actor.normaliser:
        notes.append(
            "observations are taken to be as the environment gives them: what TorchRL's transforms, such as VecNorm, "
            "do to them is not in these files"
        )
    if actor.normaliser == RUNNING_STATISTICS:
        notes.append(
            "observations are taken to be normalised by the file's running statistics, which Brax saves in any case: "
            "where the run was made without normalize_observations, pass 'running_statistics.*' as ignore"
        )
    if actor.normaliser.endswith("state_preprocessor."):
        notes.append(
            "state_preprocessor is taken for the policy's, as in skrl 1; where it is the value network's alone, as it "
            "can be in skrl 2, pass 'state_preprocessor.*' as ignore"
        )
    return notes


def _not_run(actor: Actor) -> str:
    """Return in words that the simulator cannot run the policies, and where it is known, why."""
    keys, reason = actor.keys, ""
    if match(actor.policy.shapes, Settings(outputs="logits")) is not None:
        reason = ", unless they choose discrete actions, which discrete says"
    if any(key.endswith("latent_pi.0.ra_mean") for key in keys):
        reason = " with batch normalisation (CrossQ)"
    elif {key.rpartition("actor.")[2] for key in keys} >= {"log_std", "latent_pi.0.weight", "mu.0.weight"}:
        reason = " with gSDE, whose clip_mean nothing says"
    return f"the simulator cannot run these policies{reason}: train and rollout work, evaluate does not"
