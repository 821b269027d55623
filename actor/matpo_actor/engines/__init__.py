"""Engines: who samples. One protocol (base.py), one adapter per library, imported only when asked for."""

from __future__ import annotations

from matpo.errors import SetupError
from matpo.settings import RunFile
from matpo_actor.engines.base import Engine


def make(run_file: RunFile) -> Engine:
    """The engine that the run file names, not yet started. Raises SetupError when its library is missing."""
    name = run_file.actor.engine
    try:
        if name == "vllm":
            from matpo_actor.engines.vllm import VllmEngine

            return VllmEngine.from_run_file(run_file)
        if name == "transformers":
            from matpo_actor.engines.transformers import TransformersEngine

            return TransformersEngine.from_run_file(run_file)
        from transformers import AutoTokenizer

        from matpo_actor.engines.scripted import ScriptedEngine, load_script

        assert run_file.actor.script is not None, "settings check this"
        tokenizer = AutoTokenizer.from_pretrained(str(run_file.model_folder), local_files_only=True)
        return ScriptedEngine(load_script(run_file.actor.script), tokenizer, version=-1)
    except ImportError as error:
        extra = "actor-vllm" if name == "vllm" else "actor"
        raise SetupError(
            f'engine "{name}" needs a library that is not here: {error}. Install matpo[{extra}].', reason="library"
        ) from error
