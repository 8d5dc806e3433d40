"""Temporal Difference Flows (Farebrother et al., arXiv:2503.09817): learning what a policy will visit, by bootstrapping
a flow against itself.

The successor measure m(X | s, a) solves m = (1 - gamma) P(. | s, a) + gamma E_{S'} m(. | S', pi(S')). Every variant
regresses one velocity field v on both terms of that mixture, with t uniform and X0 ~ N(0, I):

    (1 - gamma) |v(X_direct, t | S, A) - u_direct|^2 + gamma |v(X_boot, t | S, A) - u_boot|^2

    direct, all variants         X = t S' + (1 - t) X0            u = S' - X0
    td-cfm     X1 = psi_1(X0)    X = t X1 + (1 - t) X0', fresh    u = X1 - X0'
    td-cfm-c   X1 = psi_1(X0)    X = t X1 + (1 - t) X0, the same  u = X1 - X0
    td2-cfm                      X = psi_t(X0)                    u = v_target(X, t | S', A')
    mc-cfm     one term on samples of m itself, from rollouts: what the others are measured by

psi is the flow of the target field, the moving average of v, given S' and A' = pi(S'); no gradient passes through it
(paper: equations 7 to 9, Algorithm 1, appendix C.3.1). `td-dd` and `td2-dd` are the same two ideas for a diffusion that
predicts noise (section 3.1, appendix B).

Letters: B batch, D state, A action, W policy embedding, C condition, K solver steps.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastflow import ops
from fastflow.agents.checks import check_config, check_state, check_tensor, check_widths, copy_state, ready_moments
from fastflow.agents.descent import Descent, FlatGradients, GradientStep, set_rate
from fastflow.diffusion import LEVELS, DiffusionSuccessor
from fastflow.fields import MLP, Architecture, FiLMUNet, PowerFourier, Sinusoidal, TimeEmbedding
from fastflow.kernels.cpu import ONE_THREAD
from fastflow.matching_gradients import velocity_gradients
from fastflow.successor import SuccessorFlow

__all__ = ["PRESETS", "VARIANTS", "Td2CfmAgent", "Td2CfmConfig", "Td2CfmNoise", "preset_for"]

VARIANTS = ("td2-cfm", "td-cfm-c", "td-cfm", "mc-cfm", "td2-dd", "td-dd")
_DIFFUSIONS = ("td2-dd", "td-dd")
Statistics = tuple[Sequence[float], Sequence[float]]


# Configuration ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Td2CfmConfig:
    """Every hyperparameter; defaults are the paper's for one policy (its Table 5).

    Raises:
        ValueError: a value outside its range. TypeError: a value of another type. Both name the field.
    """

    variant: Literal["td2-cfm", "td-cfm-c", "td-cfm", "mc-cfm", "td2-dd", "td-dd"] = "td2-cfm"
    """Which loss, see the head of this file. mc-cfm needs rollouts under the target policy."""
    gamma: float = 0.99
    """Discount; the model looks 1 / (1 - gamma) steps ahead on average."""
    gamma_low: float | None = None
    """If given, one model for all discounts from here to gamma: drawn per row with log(1 - gamma) uniform, and part of
    the condition."""
    policy: str = "auto"
    """Target policy: a name of the world's policies, behaviour (the data's own next actions), or all (one model for the
    whole family, conditioned on the policy's embedding w). auto takes the world's first."""
    path: Literal["straight", "curved"] = "straight"
    """Interpolation between noise and data: the optimal-transport path with sigma_min = 0, or the quarter circle
    sin(pi t / 2) x_1 + cos(pi t / 2) x_0 of the paper's ablation."""
    mixture: Literal["expectation", "bernoulli"] = "expectation"
    """Both terms for every row with weights 1 - gamma and gamma (Algorithm 1), or one of them, drawn (equations 7 and
    8)."""
    terminals: Literal["ignore", "absorb"] = "ignore"
    """ignore bootstraps always, as the paper does on tasks that never end; absorb stays in a terminal state for ever,
    so a row that ends has the direct term alone, with weight one."""
    lr: float = 1e-4
    """Learning rate of AdamW."""
    weight_decay: float = 1e-3
    """Decoupled weight decay."""
    adam_eps: float = 1e-4
    """Adam's epsilon."""
    batch_size: int = 1024
    """Transitions per update."""
    tau: float | None = 1e-3
    """Share of the online field that the target takes over at every update. Bootstrapping contracts by exp(-(1 -
    gamma) tau) per update; None chooses tau so that lr_decay_steps updates are 12 such time constants, at most 0.05."""
    num_steps: int = 10
    """K: solver steps of the target's walk; td2-cfm takes all of them on the way to t."""
    method: Literal["euler", "midpoint", "heun"] = "midpoint"
    """Solver."""
    eval_num_steps: int = 10
    """K when samples are asked for."""
    ddim_steps: int = 20
    """DDIM steps of the diffusion variants (the paper says 20 in its main text and 50 in an appendix)."""
    evaluate: Literal["target", "online"] = "target"
    """Which of the two fields samples are taken from; the paper leaves it open."""
    architecture: Literal["film-unet", "mlp"] = "film-unet"
    """The paper's U-Net of FiLM layers (see fastflow.FiLMUNet for its wiring), or a plain MLP."""
    hidden: tuple[int, ...] = (512, 512, 512)
    """Widths: of the U-Net's way down, or of all hidden layers of the MLP."""
    cond_hidden: tuple[int, ...] = (512, 512, 512)
    """Widths of the U-Net's encoder of the condition."""
    time_hidden: tuple[int, ...] = (256, 256)
    """Widths of the time embedding's own MLP behind 256 sinusoids (U-Net only)."""
    time_features: int = 16
    """Sines and cosines of powers of two of t (MLP only)."""
    activation: str = "mish"
    """Activation of all layers."""
    normalize: bool = False
    """The field sees states centred and scaled by the data's statistics; the paper leaves it open."""
    cond_scale: float = 1.0
    """The state that the field is conditioned on is this many times as large as the states it samples. Where a step is
    small beside the range of states, as in mazes, larger values let the network tell neighbouring states apart."""
    lr_decay_steps: int = 0
    """Updates over which the learning rate falls by a half cosine; 0 keeps it constant, as published."""
    lr_final: float = 0.05
    """Learning rate from lr_decay_steps on, as a share of lr."""
    backend: Literal["auto", "fused", "reference"] | None = None
    """What runs the walks and losses, see fastflow.integrate."""
    precision: Literal["bf16", "tf32", "fp32"] | None = None
    """Matrix products; None follows torch's settings."""

    def __post_init__(self) -> None:
        check_widths(self, "hidden", "cond_hidden", "time_hidden")
        ranges = dict(_RANGES)
        if self.gamma_low is not None:
            ranges["gamma_low"] = (lambda x: 0 <= x <= self.gamma, f"at least 0 and at most gamma = {self.gamma}")
            if self.variant == "mc-cfm":
                raise ValueError("Td2CfmConfig: gamma_low must be None for mc-cfm, whose futures are of one gamma")
        if self.tau is None:
            if not self.lr_decay_steps:
                raise ValueError("Td2CfmConfig: tau must be a number where lr_decay_steps is 0, got None")
        else:
            ranges["tau"] = (lambda x: 0 < x <= 1, "in (0, 1]")
        check_config(self, _LEAST, ranges, _CHOICES)
        if not isinstance(self.policy, str) or not self.policy:
            raise ValueError(f"Td2CfmConfig: policy must be the name of a policy, got {self.policy!r}")
        if self.path == "curved" and self.diffusion:
            raise ValueError(f"Td2CfmConfig: path must be straight for {self.variant}, got 'curved'")

    @property
    def diffusion(self) -> bool:
        """Whether the field predicts noise."""
        return self.variant in _DIFFUSIONS

    @property
    def target_rate(self) -> float:
        """tau, chosen by the rule above where it is None."""
        if self.tau is not None:
            return self.tau
        return min(_TIME_CONSTANTS / ((1 - self.gamma) * self.lr_decay_steps), _LARGEST_TAU)

    def learning_rate(self, step: int) -> float:
        """Learning rate of the update that `step` updates came before."""
        if not self.lr_decay_steps:
            return self.lr
        done = min(step / self.lr_decay_steps, 1.0)
        return self.lr * (self.lr_final + (1 - self.lr_final) * 0.5 * (1 + math.cos(math.pi * done)))


_TIME_CONSTANTS, _LARGEST_TAU = 12.0, 0.05
_LEAST = {"batch_size": 1, "num_steps": 1, "eval_num_steps": 1, "ddim_steps": 1, "time_features": 2}
_LEAST |= {"lr_decay_steps": 0}
_RANGES = {
    "gamma": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "lr": (lambda x: x > 0, "a positive number"),
    "cond_scale": (lambda x: x > 0, "a positive number"),
    "weight_decay": (lambda x: x >= 0, "at least 0"),
    "adam_eps": (lambda x: x > 0, "a positive number"),
    "lr_final": (lambda x: 0 <= x <= 1, "in [0, 1]"),
}
_CHOICES = {
    "variant": VARIANTS,
    "path": ("straight", "curved"),
    "mixture": ("expectation", "bernoulli"),
    "terminals": ("ignore", "absorb"),
    "method": ops.METHODS,
    "evaluate": ("target", "online"),
    "architecture": ("film-unet", "mlp"),
    "backend": (None, *ops.BACKENDS),
    "precision": (None, *ops.PRECISIONS),
}

_CPU: dict[str, Any] = {
    "architecture": "mlp",
    "hidden": (128, 128, 128, 128),
    "activation": "silu",
    "batch_size": 256,
    "lr": 1e-3,
    "weight_decay": 1e-2,
    "adam_eps": 1e-8,
    "tau": None,
    "lr_decay_steps": 24_000,
}
_WIDE = (1024, 1024, 1024)

PRESETS: dict[str, dict[str, Any]] = {
    # As published: 3 M updates for one policy, 8 M for a family.
    "single-policy": {},
    "multi-policy": {
        "policy": "all",
        "hidden": _WIDE,
        "cond_hidden": _WIDE,
        "weight_decay": 1e-2,
        "tau": 1e-4,
        "eval_num_steps": 20,
    },
    # Small enough for one CPU core.
    "linear-gaussian": _CPU,
    "circle": _CPU,
    "pointmaze": {**_CPU, "normalize": True, "cond_scale": 8.0, "num_steps": 5},
    "pointmass": {**_CPU, "normalize": True, "cond_scale": 8.0, "num_steps": 5},
}
"""Settings by name, as what differs from `Td2CfmConfig()`. `single-policy` and `multi-policy` are the paper's (Table
5); the others belong to a world and to a CPU."""

LOOP_PRESETS: dict[str, dict[str, Any]] = {
    "single-policy": {"steps": 3_000_000, "eval_states": 64, "eval_samples": 2048},
    "multi-policy": {"steps": 8_000_000, "eval_states": 64, "eval_samples": 2048},
    **{
        name: {"steps": 24_000, "log_interval": 1_000, "eval_interval": 6_000, "save_interval": 6_000, "threads": 1}
        for name in ("linear-gaussian", "circle", "pointmaze", "pointmass")
    },
}
"""Defaults of the training loop that go with a preset."""


def preset_for(env_name: str) -> str | None:
    """Name of the preset for a world; None if none fits."""
    family = re.split(r"-(?=maze|arena|medium|large|giant)", env_name)[0]
    return family if family in PRESETS else None


# Multiplications of a loss up to which its gradients are computed along with it. Above, autograd's two passes gain more
# from sharing out the first among threads than all that they do besides takes.
_ONE_PASS = 4 * ONE_THREAD


# The agent ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Td2CfmNoise:
    """All random numbers of one update."""

    source: Tensor
    """Gaussian, [B, D]: X0 of the direct term and of the target's walk."""
    fresh: Tensor
    """Gaussian, [B, D]: X0' of td-cfm, and the noise that td-dd adds."""
    time: Tensor
    """Uniform, [B]: t, one for both terms."""
    mixture: Tensor
    """Uniform, [B]: which term a row takes under mixture="bernoulli"."""
    horizon: Tensor
    """Uniform, [B]: each row's discount where the model is conditioned on it."""


class Td2CfmAgent:
    """A successor flow, its moving average and their training.

    Args:
        config: hyperparameters.
        obs_dim, action_dim: D and A.
        policy_dim: W; 0 for a model of one policy.
        state_statistics, policy_statistics: (mean, std) that states [D] and embeddings [W] are centred and scaled by.
        device: where the networks live; batches must be there.
        seed: of the initial weights (the same on every device) and of all noise.
        dtype: of parameters and batches.

    Attributes:
        online: the `SuccessorFlow` that is trained.
        target: its moving average.
        optimizer: AdamW.
        generator: source of all noise.
        step: updates done.

    Raises:
        ValueError, TypeError: an argument that cannot be.
    """

    compiles: ClassVar[bool] = True
    """Whether torch.compile takes `losses` as one graph."""

    def __init__(
        self,
        config: Td2CfmConfig,
        obs_dim: int,
        action_dim: int,
        *,
        policy_dim: int = 0,
        state_statistics: Statistics | None = None,
        policy_statistics: Statistics | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(config, Td2CfmConfig):
            raise TypeError(f"Td2CfmAgent: config must be a Td2CfmConfig, got {type(config).__name__}")
        self.config = config
        self.obs_dim, self.action_dim, self.policy_dim = obs_dim, action_dim, policy_dim
        self.device, self.dtype, self.seed = torch.device(device), dtype, seed
        self.step = 0
        # Weights are drawn on the CPU in float32 whatever the device and dtype, so that a seed fixes them everywhere.
        source = torch.Generator().manual_seed(seed)
        noise_seed = int(torch.randint(2**62, (), generator=source))
        self.generator = torch.Generator(self.device).manual_seed(noise_seed)
        with torch.random.fork_rng(devices=[]):  # the constructors draw initial weights from the global generator
            self.online, self.target = (
                make_model(config, obs_dim, action_dim, policy_dim, state_statistics, policy_statistics)
                for _ in range(2)
            )
        self.online.field.reset_parameters(source)
        for model in (self.online, self.target):
            model.to(device=self.device, dtype=dtype)
        self.target.load_state_dict(self.online.state_dict())
        self.target.requires_grad_(False)
        self._online: list[Tensor] = list(self.online.parameters())
        self._target: list[Tensor] = list(self.target.parameters())
        self.optimizer = torch.optim.AdamW(
            self.online.parameters(),
            lr=config.lr,
            betas=(0.9, 0.999),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        ready_moments(self.optimizer, self.device)
        self._descent = Descent(self.optimizer)
        self._known = FlatGradients(self.online.field.parameter_list())

    @property
    def model(self) -> SuccessorFlow:
        """The one of the two models that samples are taken from."""
        return self.target if self.config.evaluate == "target" else self.online

    # Training -------------------------------------------------------------------------------------------------------

    def update(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One update. Never waits for the device.

        Args:
            batch: observations [B, D], actions [B, A], next_observations [B, D], and

                next_actions [B, A]: the target policy's actions at the next states (not for mc-cfm);
                policies [B, W]: embeddings of the policies they come from, if the model is conditioned on them;
                masks [B]: 0 where the next state is terminal, with terminals="absorb";
                futures [B, D]: samples of m(. | s, a) from rollouts, for mc-cfm.

        Returns:
            The losses as 0-d tensors, without gradient, see `losses`.

        Raises:
            ValueError, TypeError: a missing key, a tensor of another shape, dtype or device, an empty batch.
        """
        return self.update_by(self.gradient_step, batch)

    def update_by(self, step: GradientStep, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`update` with `step` in place of `gradient_step`, such as a graph of it (`fastflow.graphs`)."""
        self.check_batch(batch)
        if self.config.lr_decay_steps:
            set_rate(self.optimizer.param_groups[0], self.config.learning_rate(self.step))
        metrics = step(batch)
        self.step += 1
        return metrics

    def gradient_step(self, batch: Mapping[str, Tensor], losses: Callable[..., Any] | None = None) -> dict[str, Tensor]:
        """The part of an update that runs on the device, and reads nothing of the host's that changes between updates.

        Args:
            batch: as for `update`, checked.
            losses: in place of `losses`, such as it compiled.
        """
        for parameter in self._online:
            parameter.grad = None
        noise = self.sample_noise(batch)
        if losses is None:
            loss, metrics = self._losses(batch, noise, self.config.variant, direct=True)
        else:
            loss, metrics = losses(batch, noise)
        if loss.requires_grad:  # what native code has not differentiated already
            loss.backward()
        self._descent.step()
        with torch.no_grad():  # else the target's history would grow with every update
            torch._foreach_lerp_(self._target, self._online, self.config.target_rate)
        return metrics

    def sample_noise(self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Td2CfmNoise:
        """Fresh noise for one update on `batch`, from `generator` or the agent's own."""
        b, d = batch["observations"].shape
        options: dict[str, Any] = {
            "generator": self.generator if generator is None else generator,
            "device": self.device,
            "dtype": self.dtype,
        }
        source, fresh = torch.randn(2, b, d, **options).unbind()
        time, mixture, horizon = torch.rand(3, b, **options).unbind()
        return Td2CfmNoise(source, fresh, time, mixture, horizon)

    def losses(
        self, batch: Mapping[str, Tensor], noise: Td2CfmNoise, variant: str | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one update, and its parts.

        Args:
            batch: as for `update`. noise: as from `sample_noise`.
            variant: another flow variant than the configured one, to compare gradients at the same parameters.

        Returns:
            0-d loss with gradients for the online field alone; and without gradient `loss`, and the squared errors of
            the two terms (summed over D, averaged over rows) as `direct_loss` and `bootstrap_loss`, or
            `monte_carlo_loss`.
        """
        return self._losses(batch, noise, variant or self.config.variant, direct=False)

    def _losses(
        self, batch: Mapping[str, Tensor], noise: Td2CfmNoise, variant: str, direct: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`losses`. With `direct` native code may leave the gradients in place along with the loss, which then has no
        graph."""
        online = self.online
        if (variant in _DIFFUSIONS) != self.config.diffusion:
            raise ValueError(f"Td2CfmAgent.losses: variant must be of the kind of {self.config.variant}, got {variant}")
        gamma = self._gammas(noise)
        w = batch.get("policies") if self.policy_dim else None
        cond = online.cond(batch["observations"], batch["actions"], w, gamma if online.gamma_range else None)
        if variant == "mc-cfm":
            x, u = self._interpolate(noise.source, online.encode(batch["futures"]), noise.time)
            loss = self._regress(x, noise.time, u, cond, None, direct)[0]
            return loss, {"loss": loss.detach(), "monte_carlo_loss": loss.detach()}
        with torch.no_grad():
            next_cond = online.cond(
                batch["next_observations"], batch["next_actions"], w, gamma if online.gamma_range else None
            )
            next_state = online.encode(batch["next_observations"])
            time = self._times(noise.time)
            direct_term = self._direct(next_state, noise, time)
            bootstrap = self._bootstrap(variant, next_cond, noise, time)
            if self.config.terminals == "absorb":
                gamma = gamma * batch["masks"]
        if self.config.mixture == "bernoulli":
            # One draw of the mixture per row; the terms' own means are over the rows that took them.
            took = noise.mixture < gamma
            x, u = (torch.where(took.unsqueeze(-1), b, a) for a, b in zip(direct_term, bootstrap))
            loss, rows = self._regress(x, time, u, cond, None, direct)
            parts = tuple((rows * kind).sum() / kind.sum().clamp(min=1) for kind in (~took, took))
        else:
            # Both terms in one call: they share the condition, which is encoded once.
            x, u = (torch.stack(pair, 1) for pair in zip(direct_term, bootstrap))
            weight = 2 * torch.stack([1 - gamma, gamma], -1)  # of a mean over rows and terms
            loss, rows = self._regress(x, time.unsqueeze(1).expand(-1, 2), u, cond, weight, direct)
            parts = rows.mean(0).unbind()
        metrics = dict(zip(("loss", "direct_loss", "bootstrap_loss"), (loss, *parts)))
        # What native code has computed has no graph.
        return loss, {name: value.detach() if value.requires_grad else value for name, value in metrics.items()}

    def _gammas(self, noise: Td2CfmNoise) -> Tensor:
        """Each row's discount, [B], or a 0-d tensor."""
        low, high = self.config.gamma_low, self.config.gamma
        if low is None:
            return torch.full((), high, dtype=self.dtype, device=self.device)
        # log(1 - gamma) is uniform, and so is the logarithm of the horizon.
        return 1 - (1 - low) * ((1 - high) / (1 - low)) ** noise.horizon

    def _times(self, t: Tensor) -> Tensor:
        """Times of the losses: for diffusions those of the levels 1 .. T."""
        return t if not self.config.diffusion else 1 - ((1 - t) * LEVELS).ceil().clamp(min=1) / LEVELS

    def _interpolate(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """A point of the path from noise to data, and the path's velocity there. All [B, D], t [B]."""
        t = t.unsqueeze(-1)
        if self.config.path == "straight":
            return t * x_1 + (1 - t) * x_0, x_1 - x_0
        alpha, beta = torch.sin(0.5 * math.pi * t), torch.cos(0.5 * math.pi * t)
        return alpha * x_1 + beta * x_0, 0.5 * math.pi * (beta * x_1 - alpha * x_0)

    def _direct(self, next_state: Tensor, noise: Td2CfmNoise, t: Tensor) -> tuple[Tensor, Tensor]:
        """Where the direct term evaluates the field, and its target."""
        if isinstance(self.online, DiffusionSuccessor):
            return self.online.noised(next_state, noise.source, 1 - t), noise.source
        return self._interpolate(noise.source, next_state, t)

    def _bootstrap(self, variant: str, next_cond: Tensor, noise: Td2CfmNoise, t: Tensor) -> tuple[Tensor, Tensor]:
        """Where the bootstrapped term evaluates the field, and its target, both from the target network."""
        target, steps = self.target, self.config.num_steps
        if isinstance(target, DiffusionSuccessor):
            stop = 1 - t if variant == "td2-dd" else torch.zeros_like(t)
            x = target.denoise(noise.source, next_cond, stop, self.config.ddim_steps)
            if variant == "td2-dd":
                return x, target.velocity(x, t, next_cond)
            return target.noised(x, noise.fresh, 1 - t), noise.fresh
        if variant == "td2-cfm":
            return target.arrive(noise.source, next_cond, t, steps)
        x_1 = target.walk(noise.source, next_cond, 1.0, steps)
        return self._interpolate(noise.fresh if variant == "td-cfm" else noise.source, x_1, t)

    def _regress(
        self, x: Tensor, t: Tensor, target: Tensor, cond: Tensor, weight: Tensor | None, direct: bool
    ) -> tuple[Tensor, Tensor]:
        """The mean of weight times the online field's squared errors, 0-d, and the errors, summed over D, shaped as x
        without D. See `_losses` for direct.

        Args:
            x, target: [B, D] or [B, S, D]. t: their shape without D. cond: [B, C].
            weight: shaped as t, or [S] for all rows; None is one.
        """
        options: dict[str, Any] = {"backend": self.config.backend, "precision": self.config.precision}
        if direct and self._one_pass(x):
            dim = self.obs_dim
            shape = t.shape if t.dim() == 2 else (len(t), 1)
            given = (x.reshape(*shape, dim), t.reshape(shape), target.reshape(*shape, dim), cond)
            weights = torch.ones(shape) if weight is None else weight.expand(shape)
            found = velocity_gradients(
                self.online.field, *given, weight=weights, scale=dim, gradients=self._known.parts, **options
            )
            if found is not None:
                self._known.attach()
                loss, rows = found
                return loss * dim, rows.view(t.shape) * dim
        options |= {"reduction": "none", "dim_reduction": "sum"}
        rows = ops.velocity_matching_loss(self.online.field, x, t, target, cond, **options)
        return (rows if weight is None else weight * rows).mean(), rows

    def _one_pass(self, x: Tensor) -> bool:
        """Whether native code may compute the gradients at x along with the loss."""
        if torch.compiler.is_compiling():
            return False
        rows = x.numel() // self.obs_dim
        return self.device.type == "cpu" and self.dtype is torch.float32 and self._known.size * rows < _ONE_PASS

    def gradient(self, batch: Mapping[str, Tensor], noise: Td2CfmNoise, variant: str | None = None) -> Tensor:
        """The loss's gradient as one vector [P], for measuring its variance (paper, Theorem 5)."""
        with torch.enable_grad():  # also for a consumer that runs without
            loss, _ = self.losses(batch, noise, variant)
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(self.online.parameters()))])

    # State ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """All that exact resumption needs, as flat names to copies of tensors: parameters under `online/` and
        `target/`, Adam's moments under `adam/`, `step` and `generator`."""
        return {name: tensor.detach().clone() for name, tensor in self._tensors().items()} | {
            "step": torch.tensor(self.step, dtype=torch.int64),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a state of an agent with the same configuration and sizes. All or nothing.

        Raises:
            ValueError: names, shapes or dtypes differ, or a generator of another kind of device. TypeError: not
                tensors. The agent is then as it was.
        """
        check_state("Td2CfmAgent", self.state_dict(), state)
        copy_state(self, self._tensors(), state)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"online/{name}": value for name, value in self.online.state_dict(keep_vars=True).items()}
        tensors |= {f"target/{name}": value for name, value in self.target.state_dict(keep_vars=True).items()}
        for name, parameter in self.online.named_parameters():
            moments = self.optimizer.state[parameter]
            tensors |= {f"adam/{key}/{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        return tensors

    # Checks ---------------------------------------------------------------------------------------------------------

    def check_batch(self, batch: Mapping[str, Tensor]) -> None:
        """Raises ValueError or TypeError unless `batch` has what `update` needs."""
        widths: dict[str, int | None] = {"observations": self.obs_dim, "actions": self.action_dim}
        if self.config.variant == "mc-cfm":
            widths["futures"] = self.obs_dim
        else:
            widths |= {"next_observations": self.obs_dim, "next_actions": self.action_dim}
        if self.policy_dim:
            widths["policies"] = self.policy_dim
        if self.config.terminals == "absorb":
            widths["masks"] = None
        missing = [key for key in widths if key not in batch]
        if missing:
            raise ValueError(f"Td2CfmAgent: batch must have {', '.join(widths)}; {', '.join(missing)} missing")
        b = batch["observations"].shape[0] if isinstance(batch["observations"], Tensor) else 0
        for key, width in widths.items():
            shape = (b,) if width is None else (b, width)
            check_tensor("Td2CfmAgent", key, batch[key], shape, self.dtype, self.device)
        if b == 0:
            raise ValueError("Td2CfmAgent: batch must have at least one row, got none")


def make_model(
    config: Td2CfmConfig,
    obs_dim: int,
    action_dim: int,
    policy_dim: int = 0,
    state_statistics: Statistics | None = None,
    policy_statistics: Statistics | None = None,
) -> SuccessorFlow:
    """The network that a configuration describes, on the CPU in float32, with weights still to be drawn."""
    given = (*(state_statistics or (None, None)), *(policy_statistics or (None, None)))
    numbers = [None if x is None else torch.as_tensor(x, dtype=torch.float32) for x in given]
    names = ("state_mean", "state_std", "policy_mean", "policy_std")
    statistics: dict[str, Any] = dict(zip(names, numbers, strict=True))
    architecture: Architecture = MLP()
    time: TimeEmbedding = PowerFourier(config.time_features)
    if config.architecture == "film-unet":
        architecture = FiLMUNet(config.cond_hidden)
        time = Sinusoidal(256, config.time_hidden)
    kind = DiffusionSuccessor if config.diffusion else SuccessorFlow
    return kind(
        obs_dim,
        action_dim,
        gamma=config.gamma,
        policy_dim=policy_dim,
        gamma_range=None if config.gamma_low is None else (config.gamma_low, config.gamma),
        **statistics,
        cond_scale=config.cond_scale,
        hidden=config.hidden,
        activation=config.activation,
        time_embedding=time,
        architecture=architecture,
        num_steps=config.ddim_steps if config.diffusion else config.eval_num_steps,
        method=config.method,
        backend=config.backend,
        precision=config.precision,
        dtype=torch.float32,
    )
