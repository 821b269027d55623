"""vLLM's AsyncLLM as an engine: continuous batching, prefix cache, weights swapped while requests wait in place.

Rules kept here; each has a test in tests/actor/test_vllm_engine.py:
1. The engine core itself labels every token with the version that sampled it: nothing is inferred from arrival times.
2. A load is pause -> reload -> read back -> label -> (recompute) -> resume. What was read back must equal the snapshot:
   `reload_weights` only warns when it leaves a tensor as it was, and a tied LM head is such a tensor.
3. So the LM head is never tied: if there is no snapshot to start from, the model folder is presented with its own head.
4. The prefix cache is salted with the version, so blocks of older weights never serve a new request.
5. vLLM's processes end with this one, also after kill -9 (matpo_actor.engines.vllm_worker).

On a CPU the defaults are small and quiet: one OpenMP thread without binding (two actors on one machine would bind to
the same cores), 1 GiB of keys and values, no compilation. [actor.vllm] overrides any of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from matpo import logs, snapshot
from matpo.errors import ConfigError, InfraError, SetupError, SnapshotError
from matpo.settings import RunFile
from matpo_actor.engines.base import ENGINE_DEAD, Sampled

# vLLM reads these when it is imported. What the environment says already wins.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # an actor has threads: a fork could inherit a held lock
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from vllm import AsyncEngineArgs, SamplingParams, TokensPrompt
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

ACTOR_PID = "MATPO_ACTOR_PID"  # see vllm_worker, which is imported in vLLM's processes only
CLOSE_S = 3.0
LOAD_S = 600.0  # a load that takes longer is a broken engine
OWNED_ARGUMENTS = frozenset(
    {"model", "worker_extension_cls", "skip_tokenizer_init", "generation_config", "logprobs_mode", "trust_remote_code"}
)
"""With other values than ours, log-probs would not be those of the plain softmax, or loads would not be verified."""
KV_CACHE_BYTES = 1 << 30  # on a CPU
BROKEN = (EngineDeadError, EngineGenerateError)

log = logs.get()


class VllmEngine:
    """See the module. All methods belong to one event loop."""

    def __init__(
        self,
        model_folder: Path,
        snapshot_folder: Path,
        *,
        dtype: str = "float32",
        num_threads: int = 0,
        kv_after_update: Literal["recompute", "keep"] = "recompute",
        arguments: dict[str, Any] | None = None,
    ) -> None:
        self.version = -1
        self._model_folder, self._snapshot_folder = model_folder, snapshot_folder
        self._recompute = kv_after_update == "recompute"
        self._num_threads = num_threads
        if owned := sorted(OWNED_ARGUMENTS & (arguments or {}).keys()):
            raise ConfigError(f"actor.vllm sets {', '.join(owned)}, which the engine sets itself. Leave it out.")
        self._arguments = {"dtype": dtype, **(arguments or {})}
        self._llm: AsyncLLM | None = None
        self._open = asyncio.Event()  # no request starts while weights change
        self._loading = asyncio.Lock()
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def from_run_file(cls, run_file: RunFile) -> VllmEngine:
        """The engine that a run file asks for."""
        return cls(
            run_file.model_folder,
            run_file.snapshot_folder,
            dtype=run_file.model.dtype,
            num_threads=run_file.actor.num_threads,
            kv_after_update=run_file.actor.kv_after_update,
            arguments=run_file.actor.vllm,
        )

    async def start(self) -> None:
        """Start vLLM's processes (20 s and more). Raises SetupError."""
        if not hasattr(AsyncLLM, "update_weight_version"):
            raise SetupError(
                "this vLLM does not label tokens with a weight version. Install vllm>=0.32.", reason="library"
            )
        folder = await asyncio.to_thread(self._start_folder)
        self._shapes = read_shapes(folder)
        try:
            args = AsyncEngineArgs(**self._engine_arguments(folder))
            config = await asyncio.to_thread(args.create_engine_config)
            with _environment(self._child_environment()):
                # In a thread: it takes long, and this loop has heartbeats and signals to look after.
                llm = await asyncio.to_thread(AsyncLLM.from_vllm_config, config, disable_log_stats=True)
            self._llm = llm
            await llm.update_weight_version(str(self.version))
        except (RuntimeError, ValueError, TypeError, OSError) as error:  # pydantic's are ValueErrors
            raise SetupError(f"vLLM does not start: {error}. Check [actor.vllm] and the log above.") from error
        self._max_context = int(config.model_config.max_model_len)
        self._vocab_size = int(config.model_config.get_vocab_size())
        self._open.set()

    async def generate(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop_ids: Collection[int], seed: int | None = None
    ) -> Sampled:
        """Sample one turn; see matpo_actor.engines.base. `seed` is ignored.

        When requests in flight are reset after a weight update, vLLM rewinds the generator of a seeded one; on a CPU
        torch cannot do that, and the whole engine dies.
        """
        self._check_request(prompt_ids, max_tokens)
        await self._open.wait()
        params = SamplingParams(
            temperature=1.0,
            max_tokens=max_tokens,
            stop_token_ids=list(stop_ids),
            ignore_eos=True,  # only `stop_ids` end a turn, not what a generation_config.json adds
            logprobs=0,  # of the sampled token alone, from the raw logits
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = TokensPrompt(prompt_token_ids=list(prompt_ids), cache_salt=str(self.version))
        try:
            async for out in self._running().generate(prompt, params, uuid.uuid4().hex):
                if out.finished:
                    return _sampled(out.outputs[0])
        except BROKEN as error:
            raise InfraError(f"vLLM stopped: {error!r}", reason=ENGINE_DEAD) from error
        raise InfraError("vLLM ended a request without a result", reason="engine")

    async def load(self, folder: Path, version: int) -> float:
        """Load a snapshot, requests in flight kept; see matpo_actor.engines.base."""
        async with self._loading:
            wanted, found = self._shapes, await asyncio.to_thread(read_shapes, folder)
            if found != wanted:
                odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
                raise SnapshotError(
                    f"snapshot {folder} does not fit the model: {odd[0]} is {found.get(odd[0], 'missing')}, want "
                    f"{wanted.get(odd[0], 'no such tensor')} ({len(odd)} differ). Use one model.path everywhere.",
                    reason="tensors",
                )
            began = time.monotonic()
            self._open.clear()
            try:
                async with asyncio.timeout(LOAD_S):
                    await self._swap(folder, version)
            except (*BROKEN, TimeoutError, RuntimeError) as error:
                raise InfraError(
                    f"vLLM failed to load snapshot v{version}: {error!r}. Start the engine again.", reason=ENGINE_DEAD
                ) from error
            self._open.set()
            return time.monotonic() - began

    async def _swap(self, folder: Path, version: int) -> None:
        llm = self._running()
        await llm.pause_generation(mode="keep", clear_cache=False)
        await llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        for different, unknown in await llm.collective_rpc("matpo_compare", args=(str(folder),)):
            if different:
                raise RuntimeError(f"read back, {len(different)} tensors differ from the snapshot: {different[:3]}")
            if unknown and self.version < 0:
                log.warning(
                    "engine.not_compared", tensors=unknown[:3], num_tensors=len(unknown), why="vLLM repacked them"
                )
        await llm.update_weight_version(str(version))
        if self._recompute and not await llm.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("keys and values of the old weights could not be dropped")
        self.version = version
        await llm.resume_generation()

    async def close(self) -> None:
        """End vLLM's processes."""
        llm, self._llm = self._llm, None
        if llm is not None:
            if llm.output_handler is not None:  # or it logs that the engine is dead
                llm.output_handler.cancel()
            await asyncio.to_thread(llm.shutdown, CLOSE_S)
        if self._temporary is not None:
            self._temporary.cleanup()

    # ---- what vLLM is started with

    def _engine_arguments(self, folder: Path) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "model": str(folder),
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "worker_extension_cls": "matpo_actor.engines.vllm_worker.WorkerExtension",
            "enable_log_requests": False,
            "use_tqdm_on_load": False,
        }
        if current_platform.is_cpu():
            arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": KV_CACHE_BYTES}
        return arguments | self._arguments

    def _child_environment(self) -> dict[str, str]:
        child = {ACTOR_PID: str(os.getpid()), "PYTHONWARNINGS": "ignore"}
        if current_platform.is_cpu():
            # Without compilation vLLM still compiles a few small functions: seconds, at the first request.
            child |= {"OMP_NUM_THREADS": str(self._num_threads or 1), "TORCH_COMPILE_DISABLE": "1"}
        return child

    def _start_folder(self) -> Path:
        """The newest good snapshot, or the model folder, in either case with an LM head of its own."""
        newest = snapshot.newest(self._snapshot_folder)
        if newest is not None:
            try:
                snapshot.verify(self._snapshot_folder, newest, fingerprint=snapshot.fingerprint(self._model_folder))
            except SnapshotError as error:
                log.warning("engine.starts_from_model", reason=error.reason, error=str(error))
            else:
                return snapshot.version_folder(self._snapshot_folder, newest)
        config = json.loads((self._model_folder / "config.json").read_text(encoding="utf-8"))
        if not config.get("tie_word_embeddings", True):
            return self._model_folder
        self._temporary = tempfile.TemporaryDirectory(prefix="matpo-vllm-")
        return untie(self._model_folder, Path(self._temporary.name), config)

    # ---- requests

    def _check_request(self, prompt_ids: Sequence[int], max_tokens: int) -> None:
        self._running()
        if not prompt_ids or max_tokens < 1 or not all(0 <= i < self._vocab_size for i in prompt_ids):
            raise ValueError(f"want a prompt of ids in [0, {self._vocab_size}) and max_tokens >= 1, got {max_tokens}")
        if len(prompt_ids) + max_tokens > self._max_context:
            raise ConfigError(
                f"{len(prompt_ids)} prompt and {max_tokens} new tokens do not fit vLLM's context of "
                f"{self._max_context}. Lower roles.*.max_context_tokens or raise actor.vllm.max_model_len."
            )

    def _running(self) -> AsyncLLM:
        if self._llm is None:
            raise InfraError("vLLM is not running", reason="engine")
        return self._llm


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables for the processes that are started inside; what is set already wins."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _sampled(output: Any) -> Sampled:
    """vLLM's CompletionOutput as ours."""
    if output.finish_reason not in ("stop", "length"):
        raise InfraError(f"vLLM ended a request with {output.finish_reason!r}", reason="engine")
    tokens = list(output.token_ids)
    versions = [int(span.version) for span in output.weight_versions or () for _ in range(span.start, span.end)]
    if len(versions) != len(tokens) or len(output.logprobs) != len(tokens):
        raise InfraError(
            f"vLLM gave {len(tokens)} tokens, {len(output.logprobs)} log-probs, {len(versions)} versions",
            reason="engine",
        )
    logprobs = [float(step[token].logprob) for token, step in zip(tokens, output.logprobs, strict=True)]
    return Sampled(token_ids=tokens, logprobs=logprobs, versions=versions, finish=output.finish_reason)


def read_shapes(folder: Path) -> dict[str, list[int]]:
    """Names and shapes of a folder's tensors, from the files' headers. Raises SnapshotError."""
    shapes: dict[str, list[int]] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                shapes |= {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SnapshotError(f"snapshot {folder} cannot be read: {error}", reason="torn") from error
    return shapes


def untie(model_folder: Path, target: Path, config: dict[str, Any]) -> Path:
    """Present a model folder with tied embeddings as one with an LM head of its own. Links files, copies one tensor."""
    for path in model_folder.iterdir():
        if path.name not in ("config.json", "model.safetensors.index.json"):
            (target / path.name).symlink_to(path.resolve())
    (target / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}), encoding="utf-8")
    for path in model_folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if snapshot.LM_HEAD in names:
                break
            if snapshot.EMBEDDING in names:
                head = {snapshot.LM_HEAD: file.get_tensor(snapshot.EMBEDDING)}
                save_file(head, target / "lm_head.safetensors", metadata={"format": "pt"})
    return target
