"""The run file: one TOML document that every process reads, typed.

Rules kept here, each with a test in tests/common/test_settings.py:
1. An unknown key is an error that names the file, the line and the nearest known key.
2. All errors of a run file are reported at once.
3. A combination that cannot work is refused here, with what to do, not found out hours later.

`load_run_file` is the only door. Units are in the names: `_s`, `_bytes`, `_tokens`, `_versions`, `_fraction`, `num_*`.
Relative paths are relative to the folder the process was started in.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from matpo.errors import ConfigError

BUILTIN_TINY = "builtin:tiny"

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=1, le=65535)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def _raise_all(problems: Sequence[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))


class RunSettings(Section):
    """[run]: which run this is and where it lives."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Names the run in logs, metrics and on the wire. Two runs with one name cannot share a folder."""
    folder: Path
    """Everything the run writes: journal, snapshots, checkpoints, metrics. Shared by learner and actors."""
    seed: int = 0
    """Seeds task order and sampling."""


class ModelSettings(Section):
    """[model]: the policy that is trained."""

    path: str = BUILTIN_TINY
    """A folder that transformers can load, or "builtin:tiny" for the shipped 0.7M-parameter policy."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights that actors serve. The learner's master weights are float32."""


class BrokerSettings(Section):
    """[broker]: the one process that holds orders and episodes."""

    host: str = "127.0.0.1"
    """Address that actors and the learner connect to, and that the broker binds. Loopback by default."""
    actor_port: Port = 5710
    """Port for actors."""
    learner_port: Port = 5711
    """Port for the learner and operators."""
    lease_s: Positive = 60.0
    """An actor that is silent for this long loses its members to another."""
    heartbeat_s: Positive = 5.0
    """How often an actor renews its leases."""
    max_attempts: Count = 3
    """A member that failed this often for infrastructure reasons takes its group down with it (counted)."""
    max_lease_losses: Count = 20
    """The same for leases that ran out, as those of preempted actors do: not the member's fault, so many more."""
    max_deliveries: Annotated[int, Field(ge=0)] = 3
    """A group that was in the hands of this many dying learners is set aside (quarantined). 0: never, for runs that
    have to be repeated exactly."""
    max_order_age_s: Annotated[float, Field(ge=0)] = 0.0
    """A group that is not whole this long after it was ordered is dropped and counted. 0: never."""
    max_payload_bytes: Count = 64 * 2**20
    """One encoded episode may not be larger."""
    credit_bytes: Count = 256 * 2**20
    """Episodes held for the learner beyond this pause the actors."""
    window_bytes: Count = 64 * 2**20
    """Payload bytes on their way to the broker and not yet acknowledged, shared out among all actors; bounds memory."""
    window_episodes: Count = 4096
    """The same in episodes."""
    durability: Literal["group", "always", "interval", "never"] = "group"
    """What an acknowledgement means. group: on disk (fsync), many episodes at once. always: on disk, each by itself.
    interval: given to the kernel, on disk every sync_interval_s. never: given to the kernel. All survive kill -9;
    only the first two survive a power cut."""
    sync_interval_s: Positive = 1.0
    """For durability = "interval"."""
    journal_file_bytes: Count = 64 * 2**20
    """A payload file is sealed and a new one begun at this size."""
    keep_consumed: bool = False
    """Keep the episodes of every trained group, for `matpo replay` and for reading; the journal then only grows, until
    `matpo-broker compact`. False: a payload file goes once the oldest kept checkpoint covers all groups in it."""
    ballast_bytes: Annotated[int, Field(ge=2**20)] = 16 * 2**20
    """Kept free for the ledger, so that leases, commits and acknowledgements go on when the disk is full."""

    @model_validator(mode="after")
    def _check(self) -> BrokerSettings:
        problems = []
        if self.lease_s < 3 * self.heartbeat_s:
            problems.append(
                f"lease_s={self.lease_s:g} with heartbeat_s={self.heartbeat_s:g}: one late heartbeat loses every "
                f"lease. Set lease_s >= {3 * self.heartbeat_s:g}."
            )
        if self.actor_port == self.learner_port:
            problems.append(f"actor_port and learner_port are both {self.actor_port}. Give each its own.")
        _raise_all(problems)
        return self


class SecuritySettings(Section):
    """[security]: keys of the connections to the broker (ZeroMQ CURVE: encrypted, both ends authenticated)."""

    keys: Path | None = None
    """Folder of key files; `matpo-broker keys new RUN.TOML` makes it. None: no keys, loopback only."""
    key_file: Path | None = None
    """This process's own key file. Default: the one for its role in `keys`, for example actor.key. On a machine of an
    actor set only this: the file has all that an actor needs."""


class EnvironmentSettings(Section):
    """[environment]: where tasks, tools and reward come from."""

    name: str = "atlas"
    """A built-in environment ("atlas", "multihop"), or the name of an installed plug-in."""
    plugin: str | None = None
    """"file.py:Class" or "package.module:Class": your own environment, instead of `name`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What the environment itself takes; checked by its own Options class."""


class RoleSettings(Section):
    """[roles.NAME]: one role of the team."""

    prompt: str | None = None
    """System prompt. Default: the environment's own prompt for a role of this name."""
    prompt_file: Path | None = None
    """System prompt from a file."""
    calls: list[str] = Field(default_factory=list)
    """Tools and roles that this role may call. A call to anything else comes back as an error message."""
    description: str = ""
    """What callers are told that this role does."""
    max_turns: Count = 8
    """LLM calls in one segment, the final summary not counted."""
    max_turn_tokens: Count = 512
    """Sampled tokens in one turn."""
    max_context_tokens: Count = 4096
    """Prompt, sampled and pasted tokens in one segment together."""
    summary_tokens: Annotated[int, Field(ge=0)] = 64
    """Kept free for a final answer when turns or context run out; 0 turns the final-summary turn off."""
    summary_request: str = "Give your final answer now."
    """What the agent is told for its final-summary turn."""
    trainable: bool = True
    """False: served but not trained."""

    @model_validator(mode="after")
    def _check(self) -> RoleSettings:
        problems = []
        if self.prompt is not None and self.prompt_file is not None:
            problems.append("prompt and prompt_file are both set. Keep one.")
        if self.summary_tokens >= self.max_context_tokens:
            problems.append(
                f"summary_tokens={self.summary_tokens} leaves no room in max_context_tokens={self.max_context_tokens}."
            )
        _raise_all(problems)
        return self


class RolloutSettings(Section):
    """[rollout]: how an episode is played."""

    root: str = "planner"
    """The role that gets the task and gives the answer."""
    syntax: Literal["json", "xml"] = "json"
    """How calls are written: <tool_call>{json}</tool_call>, or MATPO's <use_mcp_tool> XML."""
    reply_role: Literal["tool", "user"] = "tool"
    """Message role under which tool output and worker replies are shown to the model."""
    worker_sees_question: bool = False
    """Put the user's question above each delegated subtask."""
    reply_tokens: Count = 256
    """A tool's or worker's reply is cut to this many tokens before it enters the caller's context."""
    max_depth: Count = 2
    """Depth of delegation: 1 = no delegation, 2 = planner -> worker."""
    max_segments: Count = 32
    """Segments in one episode; further delegations come back as an error message."""
    episode_deadline_s: Positive = 300.0
    """An episode that takes longer is ended as it stands."""
    tool_timeout_s: Positive = 30.0
    """Default time-out of one tool call."""


class SamplingSettings(Section):
    """[sampling]: how tokens are drawn while training. Anything but the plain softmax would make mu a lie."""

    temperature: Positive = 1.0
    """1.0 in training."""
    top_p: Positive = 1.0
    """1.0 in training."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """0 (off) in training."""

    @model_validator(mode="after")
    def _check(self) -> SamplingSettings:
        if (self.temperature, self.top_p, self.top_k) != (1.0, 1.0, 0):
            raise ValueError(
                f"temperature={self.temperature:g}, top_p={self.top_p:g}, top_k={self.top_k}: the learner scores "
                "tokens under the plain softmax, so importance ratios would be wrong. Use 1.0, 1.0 and 0."
            )
        return self


class ActorSettings(Section):
    """[actor]: one disposable sampler."""

    engine: Literal["transformers", "vllm", "scripted"] = "transformers"
    """Who samples: the embedded engine, vLLM, or given replies (tests)."""
    num_members: Count = 32
    """Members played at the same time by one actor."""
    device: str = "auto"
    """Where the transformers engine runs: auto, cpu, cuda, cuda:1, ..."""
    num_threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of the engine; 0 leaves it to the library."""
    kv_after_update: Literal["recompute", "keep"] = "recompute"
    """What happens to the keys and values of requests in flight when weights change."""
    outbox_bytes: Count = 256 * 2**20
    """Finished episodes kept until the broker has stored them; above this the actor pauses."""
    snapshot_poll_s: Positive = 1.0
    """How often the snapshot pointer is read, should a notice get lost."""
    drain_s: Positive = 10.0
    """After SIGTERM: time to send what is finished and hand back the rest."""
    engine_start_s: Positive = 300.0
    """An engine that is not ready by then is an error."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """Passed to vLLM's AsyncEngineArgs as they are (tensor_parallel_size, gpu_memory_utilization, ...)."""
    script: Path | None = None
    """Replies of the scripted engine (JSON lines)."""

    @model_validator(mode="after")
    def _check(self) -> ActorSettings:
        if self.engine == "scripted" and self.script is None:
            raise ValueError('engine = "scripted" needs `script`, a JSON-lines file with the replies.')
        return self


Loss = Literal["tis", "ppo_clip", "decoupled_ppo", "cispo", "gspo", "reinforce"]
Credit = Literal["matpo", "grpo", "rloo", "leader_only"]
Denominator = Literal["episode", "token", "constant"]


class LoraSettings(Section):
    """[learner.lora]: train low-rank adapters instead of all weights. Leave the section out for full fine-tuning."""

    rank: Count = 16
    """Rank of each adapter."""
    alpha: Count = 32
    """An adapter's output is scaled by alpha / rank."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Which linear layers get one: names such as "q_proj", or all but the LM head."""
    dropout: float = 0.0
    """Only 0: behaviour log-probs were recorded without dropout."""

    @model_validator(mode="after")
    def _check(self) -> LoraSettings:
        if self.dropout:
            raise ValueError(
                f"dropout={self.dropout:g}: actors sample without dropout, so importance ratios would be noise. Use 0."
            )
        return self

    def __str__(self) -> str:
        """In words, for checkpoints and errors."""
        modules = self.target_modules if isinstance(self.target_modules, str) else ",".join(sorted(self.target_modules))
        return f"adapters of rank {self.rank}, alpha {self.alpha} in {modules}"


class LearnerSettings(Section):
    """[learner]: groups -> updates -> snapshots."""

    num_updates: Count = 100
    """Optimizer batches to train; the run then ends."""
    groups_per_update: Count = 16
    """Groups with a learning signal in one batch."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """K, episodes of one task."""
    max_lag_versions: Annotated[int, Field(ge=0)] = 1
    """Batches ordered ahead of the one in training. This paces staleness: 0 is synchronous."""
    drop_lag_versions: Annotated[int, Field(ge=0)] = 8
    """Hard cap: an older group is dropped and counted when it arrives."""
    credit: Credit = "matpo"
    """"matpo": planner and workers share the planner's advantage. "grpo": a single agent. "rloo": as matpo, against the
    mean of the other members. "leader_only": as matpo, but only the root role is trained."""
    norm_std: bool = True
    """Divide the advantage by the group's standard deviation (False: Dr. GRPO). "rloo" never does."""
    advantage_eps: Positive = 1e-4
    """Added to the standard deviation."""
    task_norm: bool = False
    """Then normalise the advantages of each environment over its trained tokens of the update."""
    task_norm_min_episodes: Annotated[int, Field(ge=2)] = 16
    """An environment with fewer episodes in the update is left as it is: its mean and deviation would be noise."""
    abnormal_reward: float | None = None
    """Trained as the reward of an episode whose root ended as in abnormal_terminations. Unset: the environment's reward
    stands (where a final answer was asked for, that is the answer's)."""
    abnormal_terminations: tuple[Literal["max_turns", "max_tokens", "deadline", "error"], ...] = (
        "max_turns", "max_tokens", "deadline", "error",
    )  # fmt: skip
    """Which ends of the root are abnormal: out of turns, of tokens or context, of time, broken."""
    loss: Loss = "tis"
    """"tis" (one update per batch), "decoupled_ppo" (several minibatches), and for comparison "ppo_clip", "cispo",
    "gspo" and "reinforce" (no correction at all)."""
    denominator: Denominator = "episode"
    """What the token sum is divided by; see docs/algorithm.md."""
    constant_tokens: Count = 1024
    """The divisor of one episode when denominator = "constant"."""
    clip_low: Fraction = 0.2
    """Lower clip of the ratio: 1 - clip_low (ppo_clip, decoupled_ppo)."""
    clip_high: NonNegative = 0.28
    """Upper clip of the ratio: 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] = 3.0
    """ppo_clip: bound on the loss of a token with negative advantage."""
    tis_cap: Positive = 2.0
    """tis, decoupled_ppo: cap C of the importance weight."""
    tis_mask: Positive = 0.2
    """tis: a token whose probability already moved this far in the advantage's direction is left out."""
    tis_beta: NonNegative = 1e-3
    """tis: weight of the (log r)^2 term."""
    cispo_cap: Positive = 5.0
    """cispo: cap of the importance weight, 1 + epsilon_high of the paper, which names no value."""
    gspo_clip_low: Fraction = 3e-4
    """gspo: lower clip of a segment's ratio. The mean of many log-ratios is close to 0, so its clips are narrow; these
    are the paper's, for batches without lag. A difference between engine and learner above them clips most segments."""
    gspo_clip_high: NonNegative = 4e-4
    """gspo: upper clip of a segment's ratio."""
    prox: Literal["recompute", "loglinear"] = "recompute"
    """decoupled_ppo: log-probs before the update by a forward pass, or approximated between mu and pi by lag."""
    kl_beta: NonNegative = 0.0
    """Weight of the KL penalty (k3) against `reference`. 0: off, and no reference is loaded."""
    reference: Path | None = None
    """Model folder or snapshot (.../snapshots/v000123) of the frozen reference. Unset: model.path, where the run began.
    Each rank holds a whole copy."""
    entropy_beta: NonNegative = 0.0
    """Weight of the entropy bonus. 0: off."""
    num_minibatches: Count = 1
    """Optimizer steps per batch, whole groups each. More than one needs loss = "decoupled_ppo"."""
    learning_rate: Positive = 1e-6
    """Peak learning rate of AdamW."""
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    """Linear warm-up."""
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: NonNegative = 0.0
    """AdamW's weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    microbatch_tokens: Count = 8192
    """Tokens of one packed micro-batch. Memory, never the result, depends on it."""
    share_prefixes: bool = True
    """Compute what several segments of a micro-batch begin with once. Speed, never the result, depends on it."""
    logprob_chunk_tokens: Count = 512
    """Rows of logits that exist at one time."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of forward and backward."""
    num_threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads per rank; 0 leaves it to the library."""
    num_ranks: Count = 1
    """Processes on this machine, started by DeepSpeed's launcher."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage."""
    deepspeed_config: Path | None = None
    """A DeepSpeed config file (JSON), merged over the config that we make."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """The same as a table, merged over both: [learner.deepspeed.zero_optimization.offload_optimizer] device = "cpu"."""
    lora: LoraSettings | None = None
    """[learner.lora]: train adapters only."""
    deterministic: bool = False
    """The same episodes in the same order give the same bits: deterministic algorithms, one CPU thread by default."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    checkpoint_every: Count = 20
    """Updates between checkpoints."""
    checkpoint_interval_s: Positive = 900.0
    """A checkpoint is due also when this long has passed since the last one and a group was consumed: groups without
    signal make no update, and the broker keeps what no checkpoint covers."""
    keep_checkpoints: Count = 2
    """Older ones are deleted; the broker keeps what the oldest needs."""
    max_bad_updates: Count = 3
    """The run ends after this many updates in a row whose loss or gradient was not finite. Each is left out, counted,
    and its batch saved in bad_batches/."""
    keep_snapshots: Count = 4
    """Older ones are deleted after a grace period."""
    group_timeout_s: Positive = 600.0
    """The watchdog says who is waited for after 10 s, 20 s, 40 s, ...; from this long on as a warning."""

    @model_validator(mode="after")
    def _check(self) -> LearnerSettings:
        problems = []
        if self.num_minibatches > 1 and self.loss != "decoupled_ppo":
            problems.append(
                f'num_minibatches={self.num_minibatches} with loss="{self.loss}": after the first optimizer '
                "step the policy is no longer the one the ratios were made for. "
                'Set loss = "decoupled_ppo", or num_minibatches = 1.'
            )
        if self.prox != "recompute" and self.loss != "decoupled_ppo":
            problems.append(
                f'prox="{self.prox}" with loss="{self.loss}": only decoupled_ppo has a prox. '
                'Set loss = "decoupled_ppo", or leave prox out.'
            )
        if self.reference is not None and not self.kl_beta:
            problems.append(
                f"reference={self.reference} with kl_beta=0 does nothing. Set kl_beta > 0, or leave reference out."
            )
        if self.num_minibatches > self.groups_per_update:
            problems.append(
                f"num_minibatches={self.num_minibatches} is more than groups_per_update={self.groups_per_update}: "
                "a minibatch holds whole groups."
            )
        episodes = self.groups_per_update * self.group_size
        if self.task_norm and self.task_norm_min_episodes > episodes:
            problems.append(
                f"task_norm with task_norm_min_episodes={self.task_norm_min_episodes} does nothing: an update has "
                f"groups_per_update * group_size = {episodes} episodes. Set task_norm_min_episodes <= {episodes}."
            )
        default = type(self).model_fields["abnormal_terminations"].default
        if self.abnormal_terminations != default and self.abnormal_reward is None:
            problems.append(
                "abnormal_terminations without abnormal_reward does nothing. Set abnormal_reward to what such an end "
                "is worth, or leave abnormal_terminations out."
            )
        if self.drop_lag_versions < self.max_lag_versions:
            problems.append(
                f"drop_lag_versions={self.drop_lag_versions} drops what max_lag_versions={self.max_lag_versions} "
                f"orders. Set drop_lag_versions >= {self.max_lag_versions}."
            )
        _raise_all(problems)
        return self

    @property
    def max_open_groups(self) -> int:
        """Groups ordered and not consumed at one time: (1 + max_lag_versions) batches."""
        return (1 + self.max_lag_versions) * self.groups_per_update


class EvalSettings(Section):
    """[eval]: accuracy on held-out tasks."""

    num_tasks: Count = 200
    """Held-out tasks in one evaluation."""
    split: str = "test"
    """The environment's split to take them from. Never the one that is trained on."""


class MetricsSettings(Section):
    """[metrics]: Prometheus endpoints. 0 turns one off."""

    host: str = "127.0.0.1"
    """Address that the endpoints bind."""
    broker_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the broker's /metrics."""
    learner_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the learner's /metrics."""
    actor_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the first actor's /metrics; `matpo up` counts up from it."""


class LogSettings(Section):
    """[log]."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level written."""
    format: Literal["text", "json"] = "text"
    """Text for people, JSON lines for machines."""


class UpSettings(Section):
    """[up]: what `matpo up` starts on one machine."""

    num_actors: Count = 1
    """Actor processes."""


def _default_roles() -> dict[str, RoleSettings]:
    return {"planner": RoleSettings(calls=["worker"]), "worker": RoleSettings(calls=["search"])}


class RunFile(Section):
    """A whole run file."""

    run: RunSettings
    model: ModelSettings = ModelSettings()
    broker: BrokerSettings = BrokerSettings()
    security: SecuritySettings = SecuritySettings()
    environment: EnvironmentSettings = EnvironmentSettings()
    roles: dict[str, RoleSettings] = Field(default_factory=_default_roles)
    rollout: RolloutSettings = RolloutSettings()
    sampling: SamplingSettings = SamplingSettings()
    actor: ActorSettings = ActorSettings()
    learner: LearnerSettings = LearnerSettings()
    eval: EvalSettings = EvalSettings()
    metrics: MetricsSettings = MetricsSettings()
    log: LogSettings = LogSettings()
    up: UpSettings = UpSettings()

    @model_validator(mode="after")
    def _check(self) -> RunFile:
        problems = []
        if self.rollout.root not in self.roles:
            problems.append(
                f'rollout.root="{self.rollout.root}" is no role of this file ({", ".join(self.roles)}). '
                f"Add [roles.{self.rollout.root}] or change rollout.root."
            )
        delegates = [n for n, r in self.roles.items() if any(c in self.roles for c in r.calls)]
        if delegates and self.rollout.max_depth < 2:
            problems.append(f"roles.{delegates[0]} delegates, but rollout.max_depth=1 forbids it. Set it to 2 or more.")
        if self.learner.credit == "grpo" and delegates:
            problems.append(
                f'learner.credit="grpo" is for a single agent, but roles.{delegates[0]} delegates. '
                'Give it tools instead of roles, or set credit = "matpo".'
            )
        if not any(r.trainable for r in self.roles.values()):
            problems.append("no role is trainable. Set trainable = true in at least one [roles.*].")
        root = self.roles.get(self.rollout.root)
        if self.learner.credit == "leader_only" and root is not None and not root.trainable:
            problems.append(
                f'learner.credit="leader_only" trains only roles.{self.rollout.root}, which is frozen. '
                'Set its trainable = true, or credit = "matpo".'
            )
        _raise_all(problems)
        return self

    @property
    def journal_folder(self) -> Path:
        """The broker's durable store."""
        return self.run.folder / "journal"

    @property
    def snapshot_folder(self) -> Path:
        """Published weights, for actors."""
        return self.run.folder / "snapshots"

    @property
    def checkpoint_folder(self) -> Path:
        """What the learner needs to resume."""
        return self.run.folder / "checkpoints"

    @property
    def model_folder(self) -> Path:
        """The model's folder, with "builtin:tiny" resolved to the shipped one."""
        if self.model.path == BUILTIN_TINY:
            return Path(__file__).parent / "tiny_policy"
        return Path(self.model.path)


def load_run_file(path: Path, overrides: Sequence[str] = ()) -> RunFile:
    """Read and check a run file.

    `overrides` are "section.key=value" with value in TOML (a bare word counts as a string); they win over the file.

    Raises ConfigError with every problem of the file, one line each.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the run file {path}: {error.strerror}. Name an existing TOML file.") from error
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        _apply(document, override)
    try:
        run_file = RunFile.model_validate(document)
    except ValidationError as error:
        lines = [line for problem in error.errors() for line in _explain(path, text, dict(problem))]
        raise ConfigError("\n".join(lines)) from None
    problems = _missing_files(run_file)
    if problems:
        raise ConfigError("\n".join(f"{path}: {p}" for p in problems))
    return run_file


def _missing_files(run_file: RunFile) -> list[str]:
    problems = []
    if not (run_file.model_folder / "config.json").is_file():
        problems.append(
            f'model.path="{run_file.model.path}" holds no config.json. '
            f'Name a folder that transformers can load, or "{BUILTIN_TINY}".'
        )
    reference = run_file.learner.reference
    if reference is not None and not (reference / "config.json").is_file():
        problems.append(
            f'learner.reference="{reference}" holds no config.json. Name a model folder, or one version of a snapshots '
            "folder."
        )
    problems += [
        f"roles.{name}.prompt_file: {role.prompt_file} does not exist."
        for name, role in run_file.roles.items()
        if role.prompt_file is not None and not role.prompt_file.is_file()
    ]
    return problems


def _apply(document: dict[str, Any], override: str) -> None:
    key, sep, value = override.partition("=")
    if not sep or not key.strip():
        raise ConfigError(f"--set {override}: want section.key=value, for example --set learner.learning_rate=3e-4")
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value
    *sections, last = key.strip().split(".")
    target = document
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    target[last] = parsed


def _explain(path: Path, text: str, problem: Mapping[str, Any]) -> list[str]:
    location = tuple(str(part) for part in problem["loc"])
    dotted = ".".join(location)
    line = _line_of(text, location)
    where = f"{path}:{line}" if line else f"{path}"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f'did you mean "{close[0]}"?' if close else f"known: {', '.join(sorted(known))}"
        return [f'{where}: unknown key "{dotted}"; {hint}']
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return [f"{where}: {dotted + ': ' if dotted else ''}{line}" for line in message.splitlines()]
    if problem["type"] == "missing":
        return [f"{where}: {dotted} is missing"]
    return [f"{where}: {dotted} = {problem['input']!r}: {message}"]


def _known_keys(location: tuple[str, ...]) -> list[str]:
    """Names allowed at a place in the file: walks the models along `location`."""
    model: type[BaseModel] | None = RunFile
    for part in location:
        if model is None:
            return []
        if part not in model.model_fields:  # the NAME in [roles.NAME]
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return list(model.model_fields) if model is not None else []


def _line_of(text: str, location: tuple[str, ...]) -> int | None:
    """The line of a key in TOML text, or of the closest section above it. tomllib keeps no positions."""
    section: list[str] = []
    best: int | None = None
    best_depth = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[+\s*([^\]]+?)\s*\]+", line):
            section = [part.strip().strip("\"'") for part in header[1].split(".")]
            here = section
        elif key := re.match(r"\s*([A-Za-z0-9_.\"'-]+)\s*=", line):
            here = section + [part.strip().strip("\"'") for part in key[1].split(".")]
        else:
            continue
        if tuple(here) == location[: len(here)] and len(here) > best_depth:
            best, best_depth = number, len(here)
    return best
