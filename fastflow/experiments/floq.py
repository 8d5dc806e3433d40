"""Experiments about floq: what its paper (arXiv:2509.06863) and "What does flow matching bring to TD learning?"
(arXiv:2603.04333) claim.

`small` learns OGBench's point maze on its open arena map with the demo's networks, from data that
`fastflow collect pointmaze-arena-navigate-v0 --dataset-dir data --episodes 300` makes; the sizes that begin with
`paper` are published ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastflow.experiments.declare import Arm, Experiment, Metric, Size

__all__ = [
    "BACKUP",
    "EMBEDDING",
    "FEATURE_NORM",
    "MEDIUM",
    "NOISE_RANGE",
    "PLASTICITY",
    "PRECISION",
    "RECOVERY",
    "STEPS",
    "TARGET",
    "TARGET_NOISE",
    "TIME",
    "UTD",
]

_MEASURES = "fastflow.experiments.floq_measures"

# Success saturates on easy tasks: the mean over training still tells fast from slow and steady from not.
_SUCCESS = Metric("success", "success, mean over training", "higher", compare="difference")
_LAST = Metric("evaluation/success", "success at the end", "higher", compare="difference")
_LENGTH = Metric("evaluation/episode.length", "episode length at the end", "lower")
_ERROR = Metric("q_error", "rms error of Q", "lower", log=True)
_BIAS = Metric("q_bias", "bias of Q", compare="difference")
_CORRELATION = Metric("q_correlation", "correlation of Q and return", "higher", compare="difference")
_VARIANCE = Metric("var_z", "Var_z(Q)", log=True)
_CURVATURE = Metric("curvature", "curvature of walks")
_NORM = Metric("feature_norm.growth", "feature norm, times initial")

# A plain critic in floq's place: one step from a start that is always the same, learnt at t = 0 alone.
_MONOLITHIC: dict[str, Any] = {
    "agent.critic_flow_steps": 1,
    "agent.noise_coverage": 0.0,
    "agent.noise_samples": 1,
    "agent.train_at_zero_only": True,
}


_SEEDS = (0, 1, 2, 3, 4)
_UPDATES = 6_000


def _loop(steps: int, evaluations: int) -> dict[str, Any]:
    return {
        "env": "pointmaze-arena-navigate-singletask-v0",
        "dataset_dir": "data",
        "steps": steps,
        "agent.lr_decay_steps": steps,
        "eval_interval": steps // evaluations,
        "save_interval": steps // 2,
        "device": "cpu",
    }


def _small(steps: int = _UPDATES, **settings: Any) -> Size:
    """Less than the demo's 15,000 updates, for all seeds to fit 40 minutes: values get through the maze in time because
    the target follows faster."""
    shared = {**_loop(steps, 6), "eval_episodes": 20, "agent.tau": 0.05}
    return Size(shared | _dotted(settings), _SEEDS, "2 CPU cores, 40 minutes")


def _dotted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Names as declarations have them, from those of arguments: agent__sigma is agent.sigma."""
    return {name.replace("__", "."): value for name, value in settings.items()}


SMALL = _small()

_PUBLISHED: dict[str, str] = {
    # Presets as the follow-up's runs have them.
    "antmaze-giant-navigate": "antmaze-giant-navigate/best",
    "humanoidmaze-large-navigate": "humanoidmaze-large-navigate/online",
    "puzzle-4x4-play": "puzzle-4x4-play/best",
}


def _sizes(envs: Sequence[str], small: Size | None = None, **settings: Any) -> dict[str, Size]:
    """`small`; the first published environment as `paper`, the others by their names, with `settings` for all."""
    sizes = {"small": small or SMALL}
    for env in envs:
        name = "paper" if env == envs[0] else f"paper-{env.rpartition('-')[0]}"
        # Learning stays offline, also with a preset that is for fine-tuning, unless `settings` says otherwise.
        shared: dict[str, Any] = {"env": f"{env}-singletask-v0", "preset": _PUBLISHED.get(env, env)}
        shared |= {"steps": 2_000_000, "online_steps": 0, **_dotted(settings)}
        sizes[name] = Size(shared, (0, 1, 2, 3, 4), "a GPU, days")
    return sizes


def _arm(name: str, label: str, settings: dict[str, Any] | None = None, after: str = "critic", **options: Any) -> Arm:
    return Arm(name, label, settings or {}, after=f"{_MEASURES}:{after}", **options)


STEPS = Experiment(
    name="floq-steps",
    title="Integration steps of floq's critic",
    agent="floq",
    question="Does a critic that walks more steps make a better policy?",
    arms=(
        *(
            _arm(f"k{steps}", f"K = {steps}", {"agent.critic_flow_steps": steps}, x=float(steps), group="floq")
            for steps in (1, 2, 4, 8, 16)
        ),
        _arm(
            "k1-at-zero",
            "K = 1, trained at t = 0 alone",
            {"agent.critic_flow_steps": 1, "agent.train_at_zero_only": True},
        ),
    ),
    # What the errors of values are at the end of learning: as long as the demo.
    sizes=_sizes(
        ("antmaze-giant-navigate", "humanoidmaze-large-navigate"),
        Size(_loop(15_000, 10), _SEEDS, "2 CPU cores, 90 minutes"),
    ),
    # A better critic is the claim: what its values are off by comes first.
    metrics=(_ERROR, _BIAS, _CORRELATION, _SUCCESS, _LAST, _LENGTH, _VARIANCE, _CURVATURE),
    x="integration steps K",
    reference="k1",
)

NOISE_RANGE = Experiment(
    name="floq-noise-range",
    title="Width of the noise that floq's walks start from",
    agent="floq",
    question="How wide should the noise be, as a share of the range of values?",
    arms=tuple(
        _arm(f"kappa{kappa:g}", f"kappa = {kappa:g}", {"agent.noise_coverage": kappa}, x=kappa, group="floq")
        for kappa in (0.0, 0.03, 0.1, 0.25, 0.5, 1.0)
    ),
    sizes=_sizes(("puzzle-4x4-play", "antmaze-giant-navigate")),
    metrics=(_SUCCESS, _LAST, _LENGTH, _ERROR, _VARIANCE, _CURVATURE),
    x="noise coverage kappa",
    reference="kappa0.1",
)

EMBEDDING = Experiment(
    name="floq-embedding",
    title="How floq's critic sees the state of its walk",
    agent="floq",
    question="Are HL-Gauss features needed, and how wide?",
    arms=(
        _arm("hl-gauss-16", "HL-Gauss, sigma 16 (published)", {"agent.sigma": 16.0}, group="HL-Gauss"),
        _arm("hl-gauss-3", "HL-Gauss, sigma 3", {"agent.sigma": 3.0}, group="HL-Gauss"),
        _arm("scalar", "one scaled number", {"agent.use_prob_embed": False}, group="scalar"),
    ),
    sizes=_sizes(("humanoidmaze-large-navigate", "antmaze-giant-navigate")),
    metrics=(_SUCCESS, _LAST, _LENGTH, _ERROR, _CURVATURE),
    reference="hl-gauss-16",
)

TIME = Experiment(
    name="floq-time",
    title="How floq's critic sees time",
    agent="floq",
    question="Does the paper's Fourier embedding help over the released code's cos(t), and over t itself?",
    arms=(
        _arm("cosine", "cos(t) (released)", {"agent.time_embedding": "cosine"}),
        _arm("fourier", "cos(i pi t), i = 1..64 (paper)", {"agent.time_embedding": "fourier"}),
        _arm("raw", "t", {"agent.time_embedding": "raw"}),
    ),
    sizes=_sizes(("humanoidmaze-large-navigate", "antmaze-giant-navigate")),
    metrics=(_SUCCESS, _LAST, _LENGTH, _ERROR, _CURVATURE),
    reference="cosine",
)

BACKUP = Experiment(
    name="floq-backup",
    title="Expected and distributional backups of floq's critic",
    agent="floq",
    question="Does it help, or hurt, that every noise sample learns its own bootstrapped value?",
    arms=(
        _arm("expected", "expected", {"agent.backup": "expected"}),
        _arm("distributional", "distributional", {"agent.backup": "distributional"}),
    ),
    sizes=_sizes(
        (
            "humanoidmaze-large-navigate",
            "antmaze-giant-navigate",
            "cube-double-play",
            "humanoidmaze-medium-navigate",
        ),
        # With one noise sample, as in the demo's preset, there is nothing to average.
        _small(agent__noise_samples=4),
    ),
    metrics=(_SUCCESS, _LAST, _LENGTH, _ERROR, _VARIANCE, Metric("q_mean", "mean Q")),
    reference="expected",
)

TARGET = Experiment(
    name="floq-target",
    title="Predicting velocities and predicting values",
    agent="floq",
    question="Does a network that predicts the end of the walk, instead of the velocity, fall back to a plain critic?",
    arms=(
        _arm("velocity", "velocity (floq)", {"agent.prediction": "velocity"}),
        _arm("endpoint", "value", {"agent.prediction": "endpoint"}),
        _arm("monolithic", "plain critic", _MONOLITHIC),
    ),
    sizes=_sizes(("antmaze-giant-navigate", "humanoidmaze-large-navigate", "cube-double-play")),
    metrics=(_SUCCESS, _LAST, _LENGTH, _ERROR, _VARIANCE, _CURVATURE),
    reference="velocity",
)

_RECOVERED = (0, 25, 50, 75, 100)

RECOVERY = Experiment(
    name="floq-recovery",
    title="Walks whose first steps are those of a stale critic",
    agent="floq",
    question="Do later steps make up for early ones by weights from the middle of training?",
    arms=(
        _arm("velocity", "velocity (floq)", {"agent.prediction": "velocity"}, after="recovery"),
        _arm("endpoint", "value", {"agent.prediction": "endpoint"}, after="recovery"),
    ),
    sizes=_sizes(
        ("antsoccer-arena-navigate", "humanoidmaze-medium-navigate", "cube-double-play"),
        _small(keep_checkpoints=2),
        save_interval=1_000_000,
        keep_checkpoints=2,
    ),
    metrics=tuple(
        metric
        for percent in _RECOVERED
        for metric in (
            Metric(f"q_error.{percent}", f"rms error of Q, {percent} % stale", "lower"),
            Metric(f"length.{percent}", f"episode length, {percent} % stale", "lower"),
            Metric(f"success.{percent}", f"success, {percent} % stale", "higher", compare="difference"),
        )
    ),
    reference="velocity",
)

TARGET_NOISE = Experiment(
    name="floq-target-noise",
    title="Noise on the critic's targets",
    agent="floq",
    question="Which critic bears noisy targets better?",
    arms=tuple(
        _arm(
            f"{name}-{noise}",
            f"{label}, noise {noise}",
            {"agent.target_noise": float(noise), **settings},
            x=float(noise),
            group=label,
            reference=f"{name}-0",
        )
        for name, label, settings in (("floq", "floq", {}), ("monolithic", "plain critic", _MONOLITHIC))
        for noise in (0, 4, 8, 16)
    ),
    sizes=_sizes(("humanoidmaze-medium-navigate", "antsoccer-arena-navigate", "antmaze-large-navigate")),
    metrics=(_SUCCESS, _LAST, _LENGTH, _ERROR),
    x="standard deviation of target noise",
)

PLASTICITY = Experiment(
    name="floq-plasticity",
    title="Critics whose hidden layers are frozen half-way, with a new head",
    agent="floq",
    question="How much does a critic still learn on features that no longer change?",
    arms=tuple(
        _arm(
            f"{name}-{state}",
            f"{label}, {state}",
            settings if state == "frozen" else {"agent.freeze_features_at": 0, **settings},
            group=label,
            reference=f"{name}-learning",
        )
        for name, label, settings in (("floq", "floq", {}), ("monolithic", "plain critic", _MONOLITHIC))
        for state in ("learning", "frozen")
    ),
    sizes=_sizes(
        ("antmaze-giant-navigate", "antsoccer-arena-navigate", "cube-double-play", "puzzle-4x4-play"),
        _small(agent__freeze_features_at=_UPDATES // 2),
        agent__freeze_features_at=1_000_000,
    ),
    metrics=(_SUCCESS, _LAST, _LENGTH, _ERROR),
)

FEATURE_NORM = Experiment(
    name="floq-feature-norm",
    title="Norms of the critics' last features under three kinds of targets",
    agent="floq",
    question="Do features grow under bootstrapped targets, and does a flow critic keep them small?",
    arms=tuple(
        _arm(
            f"{name}-{target}",
            f"{label}, {words}",
            {"agent.critic_target": target, **settings},
            group=label,
            reference=f"{name}-returns",
        )
        for name, label, settings in (("floq", "floq", {}), ("monolithic", "plain critic", _MONOLITHIC))
        for target, words in (("policy", "Q-learning"), ("data", "SARSA"), ("returns", "Monte Carlo"))
    ),
    sizes=_sizes(("antmaze-giant-navigate", "humanoidmaze-medium-navigate")),
    metrics=(_NORM, Metric("feature_norm", "feature norm"), _SUCCESS, _LAST),
)

# Data: fastflow collect pointmaze-medium-navigate-v0 --dataset-dir data --episodes 300. Every other arm changes one
# thing of the preset, but for the last: what did best with one candidate.
MEDIUM = Experiment(
    name="floq-medium",
    title="floq on pointmaze-medium",
    agent="floq",
    question="Why does a small floq learn the medium maze and then lose it, and what keeps it?",
    arms=(
        _arm("cpu", "preset", after="maze"),
        _arm("kappa0.03", "kappa 0.03", {"agent.noise_coverage": 0.03}, after="maze"),
        _arm("unclipped", "values not clipped", {"agent.clip_values": False}, after="maze"),
        _arm(
            "one",
            "one candidate, not clipped; alpha 2, gamma 0.998, scaled to 12",
            {
                "agent.num_candidates": 1,
                "agent.clip_values": False,
                "agent.alpha": 2.0,
                "agent.discount": 0.998,
                "observation_scale": 12.0,
            },
            after="maze",
        ),
    ),
    sizes={
        "small": Size(
            {
                "env": "pointmaze-medium-navigate-singletask-v0",
                "preset": "pointmaze-medium-navigate/cpu",
                "dataset_dir": "data",
                "device": "cpu",
            },
            _SEEDS,
            "2 CPU cores, 1 hour",
        )
    },
    metrics=(
        _LAST,
        _LENGTH,
        _SUCCESS,
        Metric("lost", "share lost of 20 episodes", "lower", compare="difference"),
        Metric("lost.rows", "data where it gets lost, of 100,000"),
        Metric("lost.excess", "value there above the scripted policy's", compare="difference"),
        _VARIANCE,
    ),
    reference="cpu",
)

# One setting for every network of the agent, for losses as well as walks: more than mixed precision rounds as a rule.
PRECISION = Experiment(
    name="floq-precision",
    title="Precision of floq's matrix products",
    agent="floq",
    question="Does a floq whose products are of bfloat16, or TF32, learn what float32 does?",
    arms=(
        _arm("fp32", "float32", {"agent.precision": "fp32", "matmul_precision": "highest"}),
        _arm("bf16", "bfloat16", {"agent.precision": "bf16", "matmul_precision": "highest"}),
        _arm("tf32", "TF32 (float32 on a CPU)", {"agent.precision": "tf32", "matmul_precision": "high"}),
    ),
    sizes={
        "small": SMALL,
        "small-gpu": Size({**SMALL.settings, "device": "cuda"}, SMALL.seeds, "a GPU, minutes"),
        **_sizes(("cube-single-play",)),
    },
    metrics=(_SUCCESS, _LAST, _LENGTH, _ERROR, _BIAS),
    reference="fp32",
)

_ONLINE = 1_500

UTD = Experiment(
    name="floq-utd",
    title="Updates per environment step, online with offline data from the first step",
    agent="floq",
    question="Which critic makes use of many updates per environment step?",
    arms=tuple(
        _arm(f"{name}-{ratio}", f"{label}, {ratio}", {"utd_ratio": ratio, **settings}, x=float(ratio), group=label)
        for name, label, settings in (("floq", "floq", {}), ("monolithic", "plain critic", _MONOLITHIC))
        for ratio in (1, 2, 4, 8)
    ),
    sizes=_sizes(
        (
            "antmaze-giant-navigate",
            "antsoccer-arena-navigate",
            "humanoidmaze-large-navigate",
            "humanoidmaze-medium-navigate",
        ),
        # The learning rate stays as it is: decays of different lengths would be compared besides.
        _small(
            0,
            online_steps=_ONLINE,
            balanced_sampling=True,
            agent__lr_decay_steps=0,
            eval_interval=_ONLINE // 6,
            save_interval=_ONLINE,
            log_interval=_ONLINE // 6,
        ),
        steps=0,
        online_steps=1_000_000,
        balanced_sampling=True,
    ),
    metrics=(_SUCCESS, _LAST, _LENGTH, _ERROR),
    x="updates per environment step",
)
