"""``lm_eval --model specrej`` and ``--model best_of_n``: lm-eval's Hugging Face model, decoding our way.

Loading, tokenisation, chat templates and log-likelihoods are lm-eval's own (``HFLM``). This file turns its requests
into prompts, results into the strings it wants, and what happened into the ``specrej`` block of its results file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string
from transformers import PreTrainedModel

from specrej_eval import budget, chat_templates, ranks, stopping
from specrej_eval.api import RunPlan
from specrej_eval.config import Decides, RunConfig, names
from specrej_eval.config.engines import TRANSFORMERS, engine_of
from specrej_eval.core import Prompt, finite_or_none, prompt_hash
from specrej_eval.engines.base import Engine
from specrej_eval.errors import ConfigError, PromptError
from specrej_eval.generator import Generator
from specrej_eval.harness.lm_eval import run as lm_eval_run
from specrej_eval.harness.lm_eval.no_model import NoModel, no_loglikelihoods
from specrej_eval.harness.lm_eval.options import check_host_arguments, merge_options, name_of, seq2seq_refused
from specrej_eval.harness.lm_eval.requests import (
    SAMPLED_TASKS,
    ChatPrompt,
    Draw,
    ScoredText,
    Translated,
    conversation_of,
    describe_ignored,
    draws_of,
    translate,
)
from specrej_eval.harness.lm_eval.tally import Tally, strict_json
from specrej_eval.in_flight import Request
from specrej_eval.records import fingerprint
from specrej_eval.redaction import opened, redacted_values
from specrej_eval.special_tokens import ALLOW, Marked, SpecialTokenError, Tokeniser, check_text, concerned

logger = logging.getLogger("lm_eval.models.specrej")  # below lm-eval's own logger: its format and --verbosity hold

VERSIONS = ("specrej_eval", "lm_eval", "torch", "transformers")
FINGERPRINT = "specrej:fingerprint"


class SpecRejLM(HFLM):
    """A causal language model whose answers are chosen by a reward model while they are being written.

    Args are those of ``RunConfig`` (see docs/arguments.md) and those of ``HFLM``, in ``--model_args``, in Python, or
    as the constructor's keywords. Without ``pretrained`` the embedded demo pair is used.

    ``batch_size`` is the number of prompts decoded at the same time; results never depend on it. lm-eval passes its
    own ``--batch_size`` (1 unless you say otherwise), so: in ``--model_args`` it means what it says, 1 included; as
    ``--batch_size`` 1 counts as not given, and so does ``auto``, our own default. Log-likelihood requests take
    lm-eval's ``--batch_size`` as they would with ``--model hf``, whose numbers they reproduce (but those of Gemma 2 on
    transformers before 5.21, which leaves out its softcap there); the reward model has no part in them.

    ``max_gen_toks`` holds for tasks that set none of their own; ``--gen_kwargs max_gen_toks=...`` overrides those too.

    Raises:
        ConfigError: before anything is loaded, if an argument is unknown, wrong, or disagrees with another.
        CheckpointError: likewise, if a checkpoint is missing or of the wrong kind.
    """

    default_strategy: ClassVar[str] = "speculative_rejection"
    _watch: ranks.Watch | None = None

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | PreTrainedModel | None = None,
        *,
        harness_options: Mapping[str, Any] | None = None,
        host_run: lm_eval_run.HostRun | None = None,
        **arguments: Any,
    ) -> None:
        loaded = pretrained if isinstance(pretrained, torch.nn.Module) else None
        arguments["pretrained"] = name_of(loaded) if loaded is not None else pretrained
        arguments.setdefault("strategy", self.default_strategy)
        named = host_run is not None and host_run.device_given
        host_batch_size, notes = merge_options(arguments, harness_options or {}, device_given=named)
        self.seed_from = lm_eval_run.FROM_MODEL_ARGS if "seed" in arguments else lm_eval_run.FROM_DEFAULT
        if host_run is not None:
            arguments["seed"], self.seed_from = host_run.seed(arguments)
        config, host = RunConfig.from_args(arguments)
        budget.check_arguments(config, max_gen_toks_known="max_gen_toks" in arguments)
        if host_run is not None:
            lm_eval_run.checked_against(host_run, translate, config)
        check_host_arguments(host)
        if config.join and host_run is not None and host_run.use_cache:
            raise _cache_of_several()
        limits = [name for name in ("max_seconds", "max_decode_tokens") if getattr(config, name) is not None]
        if limits and config.journal is None:
            raise ConfigError(
                f"{limits[0]} needs journal=FILE inside lm-eval, which makes no results of a part of a task: what is "
                "answered by then would be lost.",
                hint="add journal=FILE to --model_args; the same command then goes on from there.",
            )
        plan = RunPlan.of(config, host, objects=("pretrained",) if loaded is not None else ())

        if config.pretrained is None:
            logger.info("No pretrained= is given: the embedded demo pair answers, which knows nothing but small sums.")
        if config.attn_implementation is not None and loaded is None:
            host["attn_implementation"] = config.attn_implementation
        self._engine_name = engine_of(config.engine)
        started = ranks.started() if loaded is None and not host.get("tp_plan") else 1
        if started > 1 and "LOCAL_RANK" in os.environ and plan.engine.device == "cpu":
            # torchrun alone: without this, accelerate takes every rank on a CPU for the only one
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")
        with ranks.asking_accelerate(started, command="lm_eval"):
            super().__init__(
                pretrained=plan.engine.name if loaded is None else loaded,
                device=plan.engine.device,
                dtype=plan.engine.dtype,
                trust_remote_code=config.trust_remote_code,
                batch_size=host_batch_size,
                **host,
            )
        if hasattr(self, "accelerator"):  # HFLM leaves CPU ranks at 0 of 1, and takes the local index for the rank
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes
        ranks.check_seen(started, self.world_size, command="lm_eval")
        self._watch = ranks.watch(self.rank, self.world_size)

        self.plan = plan.of_rank(self.rank, self.world_size, device=str(self.device))
        self.run_config = self.plan.config  # HFLM has a `config` already: the checkpoint's
        self.tokeniser = Tokeniser(self.tokenizer, config.special_tokens_in_content or ALLOW)
        self.tally = Tally()
        self._uses_chat_template = False
        self._ranks: list[Tally] = []
        self.generator = self._generator()
        self.generator.processes = self.world_size
        for note in notes:
            self._warn(note)
        if host_run is not None and self.rank == 0:
            seed = host_run.gen_kwargs.get("seed")
            logger.info("All draws use seed %s (from %s).", config.seed if seed is None else seed, self.seed_from)
        if self.mixed_precision_dtype is not None:
            self._warn("mixed_precision_dtype applies to log-likelihood requests only; dtype decides for the others.")

    # How lm-eval makes us

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> SpecRejLM:
        """Make the model from ``--model_args`` and lm-eval's own options (batch_size, max_batch_size, device).

        lm-eval's seed and ``--gen_kwargs`` are those of the ``simple_evaluate`` that calls this, if one does.
        """
        run = lm_eval_run.current()
        if run is None and lm_eval_run.is_blind() and "seed" not in arg_dict:
            logger.warning(
                "lm-eval's --seed has no effect here (our startup hook has not reached lm-eval, or this is a "
                "release we do not know). Give seed= in --model_args; `specrej-eval doctor` says more."
            )
        return cls(**{**opened(arg_dict), "harness_options": additional_config, "host_run": run})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> SpecRejLM:
        """As ``create_from_arg_obj``, from ``a=1,b=2``."""
        return cls.create_from_arg_obj(simple_parse_args_string(opened(arg_string)), additional_config)

    def _create_model(self, pretrained: str, **arguments: Any) -> None:
        """lm-eval loads the weights for our own engine alone; the others load theirs."""
        if self._engine_name == TRANSFORMERS:
            super()._create_model(pretrained, **arguments)
        else:
            self._model = NoModel(self.config, pretrained)

    @property
    def model(self) -> Any:
        """HFLM's, taken out of what accelerate has put around it; there is nothing to take out of no model."""
        return super().model if self._engine_name == TRANSFORMERS else self._model

    @property
    def max_length(self) -> int:
        """The context in tokens: HFLM's, or that of the engine that has the model."""
        return int(super().max_length) if self._engine_name == TRANSFORMERS else self.generator.engine.max_length

    def _generator(self) -> Generator:
        if self._engine_name == TRANSFORMERS:
            from specrej_eval.engines.transformers.loading import engine_of_model

            reward = self.plan.reward.load(str(self.device))
            engine: Engine = engine_of_model(
                self.plan.engine,
                self.model,
                self.tokenizer,
                max_length=self.max_length,
                think_end_token=self.think_end_token,
            )
        else:
            engine, reward = self.plan.load(content_rule=ALLOW)
        models = None if self.run_config.journal is None else self._from_first_rank(self.plan.of_models)
        return self.plan.generator(engine, reward, models=models)

    def _get_backend(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super()._get_backend(config, *args, **kwargs)
        if self.backend != "causal":
            raise seq2seq_refused()

    # Requests in, strings out

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """One answer for each request, in order; each a ``ScoredText``.

        Raises:
            ConfigError: some request's arguments are wrong; all are checked before the first one is decoded.
        """
        self._refuse_cached_repeats(requests)
        draws, source = draws_of(requests)
        self._warn_of_special_tokens(draws)
        work = self._translated(draws)
        texts: list[str] = [""] * len(draws)
        first = {draw.instance.task_name or "": index for index, draw in reversed([*enumerate(draws)])}
        if self.run_config.plan is not None:
            self._plan_only(work)
        progress = not disable_tqdm and self.rank == 0
        with self._needs_all_ranks(), self._keeping(len(draws)) as kept:
            for index, result in self.generator.run(work, progress=progress):
                instance = draws[index].instance
                texts[index] = ScoredText(result.text, finite_or_none(result.best.reward), result.best.num_tokens)
                self.tally.add(result, first_of_task=first[instance.task_name or ""] == index)
                context, gen_kwargs = instance.args
                with stopping.held():
                    self.cache_hook.add_partial("generate_until", (context, gen_kwargs), texts[index])
                    kept.add()
        return [texts[index] for index in source]

    def _plan_only(self, work: Sequence[Request]) -> None:
        """Say what answering would take, and end before lm-eval can make scores of nothing."""
        with self._needs_all_ranks():
            if self.rank == 0:
                sys.stderr.flush()
                print(self.generator.forecast(work), flush=True)
            super().barrier()
        raise SystemExit(0)

    def requests_of(self, instances: Sequence[Any], config: RunConfig) -> list[Request]:
        """What ``generate_until`` would decode with other arguments, none of them about the models.

        Raises:
            ConfigError, PromptError: as ``generate_until``.
        """
        own, self.run_config = self.run_config, config
        try:
            draws, _ = draws_of(instances)
            self._warn_of_special_tokens(draws)
            return self._translated(draws)
        finally:
            self.run_config = own

    @contextlib.contextmanager
    def _keeping(self, total: int) -> Iterator[stopping.Kept]:
        """Count what --use_cache keeps, and see that it is on disk, however this ends. A journal counts for itself."""
        cache = self.cache_hook.dbdict
        if cache is None or self.run_config.journal is not None:
            yield stopping.Kept(total, None)
            return
        with stopping.keeping(total, cache.filename) as kept:
            try:
                yield kept
            finally:
                cache.commit(blocking=True)

    def _translated(self, draws: Sequence[Draw]) -> list[Request]:
        requests = []
        known: dict[int, tuple[Translated, Prompt]] = {}
        for draw in draws:
            instance = draw.instance
            task = instance.task_name or ""
            if id(instance) not in known:
                context, gen_kwargs = instance.args
                translated = self._arguments_for(task, gen_kwargs)
                known[id(instance)] = translated, self._prompt(task, context, translated.config)
            translated, prompt = known[id(instance)]
            if translated.asks_greedy:
                self.tally.task(task).greedy_overridden += translated.config.on_greedy == "sample"
            if draw.repeat:
                prompt = dataclasses.replace(prompt, repeat=draw.repeat)
            requests.append(Request(prompt=prompt, config=translated.config, until=translated.until))
        return requests

    def _arguments_for(self, task: str, gen_kwargs: Mapping[str, Any]) -> Translated:
        if task in SAMPLED_TASKS:
            gen_kwargs = {"do_sample": True, **gen_kwargs}
        try:
            run = lm_eval_run.current()
            explicit = run.gen_kwargs if run is not None else {}
            translated = translate(gen_kwargs, self.run_config, explicit=explicit)
            if translated.config.seed != self.run_config.seed:
                named = explicit.get("seed") is not None
                self.seed_from = lm_eval_run.FROM_GEN_KWARGS if named else lm_eval_run.FROM_TASK
        except ConfigError as error:
            raise ConfigError(
                f"task {task!r}, gen_kwargs {dict(gen_kwargs)!r}: {error.args[0]}", hint=error.hint
            ) from None
        if translated.asks_greedy and translated.config.on_greedy == "error":
            raise ConfigError(
                f"task {task!r} asks for greedy decoding, which on_greedy=error refuses.",
                hint="on_greedy=sample samples candidates anyway; on_greedy=greedy decodes one row greedily.",
            )
        if translated.asks_greedy and translated.config.on_greedy == "sample":
            config = translated.config
            self._warn(
                f"Task {task!r} (or --gen_kwargs) asks for greedy decoding, which gives a single answer; several "
                f"are sampled instead (temperature={config.temperature}, top_p={config.top_p}, top_k={config.top_k}, "
                f"seed={config.seed}), unless you set on_greedy=greedy or on_greedy=error."
            )
        if translated.ignored:
            self._warn(f"Task {task!r}: gen_kwargs not used here: {describe_ignored(translated.ignored)}.")
        return translated

    def _prompt(self, task: str, context: str, config: RunConfig) -> Prompt:
        room = self.max_length - config.max_gen_toks
        if room < 1:
            raise ConfigError(
                f"task {task!r}: max_gen_toks={config.max_gen_toks} leaves no room for a prompt in the model's context "
                f"of {self.max_length:,} tokens.",
                hint="lower max_gen_toks (a task's own value is overridden by --gen_kwargs max_gen_toks=...).",
            )
        token_ids = self._encoded(task, context) or [self.prefix_token_id]
        if len(token_ids) > room:
            self.tally.task(task).truncated += 1
            self._warn(
                f"Task {task!r} has prompts longer than {room} tokens (context {self.max_length} minus "
                f"max_gen_toks={config.max_gen_toks}): their beginning is cut off. The first has {len(token_ids)}.",
                key=("truncated", task),
            )
            token_ids = token_ids[-room:]
        if self._uses_chat_template and not isinstance(context, ChatPrompt):
            self._warn(
                f"Task {task!r}: prompts lost their chat messages; the reward model reads the rendered text.",
                key=("messages", task),
            )
        conversation, response_prefix = conversation_of(context)
        return Prompt(
            token_ids=tuple(token_ids),
            conversation=conversation,
            response_prefix=response_prefix,
            prompt_hash=prompt_hash(context),
            task=task,
        )

    def _encoded(self, task: str, context: str) -> list[int]:
        """As ``tok_encode``, with ``special_tokens_in_content`` if it is given."""
        try:
            check_text(context)
        except PromptError as error:
            raise PromptError(f"task {task!r}: {error.args[0]}", hint=error.hint) from error
        try:
            marked = self._marked(context)
        except SpecialTokenError as error:
            raise PromptError(
                f"task {task!r}: {error}.", hint="special_tokens_in_content=allow reads them as --model hf does."
            ) from error
        if not marked.marks:
            return list(self.tok_encode(context))
        bos = self.tokenizer.decode(self.prefix_token_id)  # as in tok_encode
        return self.tokeniser.raw_context(marked, bos, self.add_bos_token)

    def _marked(self, context: str) -> Marked:
        if self.tokeniser.rule == ALLOW:
            return Marked(str(context), ())
        if not isinstance(context, ChatPrompt):  # few-shot text: nothing in it is a template's
            return self.tokeniser.all_content(context)
        if not self.tokeniser.check([message["content"] for message in context.messages]):
            return Marked(str(context), ())

        theirs = super().apply_chat_template

        def render(contents: Sequence[str]) -> str:
            messages = [{**message, "content": text} for message, text in zip(context.messages, contents, strict=True)]
            return str(chat_templates.in_time(lambda: theirs(messages, context.add_generation_prompt)))

        return self.tokeniser.marked([message["content"] for message in context.messages], render, str(context))

    def _warn_of_special_tokens(self, draws: Sequence[Draw]) -> None:
        if self.run_config.special_tokens_in_content is not None:
            return
        by_task: dict[str, dict[str, list[str]]] = {}
        for draw in draws:
            context = draw.instance.args[0]
            contents = [m["content"] for m in context.messages] if isinstance(context, ChatPrompt) else [context]
            by_task.setdefault(draw.instance.task_name or "", {})[context] = contents
        for task, prompts in by_task.items():
            told = concerned(self.tokeniser, ["\n".join(contents) for contents in prompts.values()])
            if told is None:
                continue
            if self.world_size == 1:
                self._warn(f"Task {task!r}: {told}", key=("special tokens", task))
                continue
            told = f"Task {task!r}, rank {self.rank}: {told}"  # each rank knows its own prompts only
            self._warn(told, key=("special tokens", task, self.rank))
            if self.rank > 0:
                logger.warning(told)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._warn_of_loglikelihood()
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        self._warn_of_loglikelihood()
        return list(super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm))

    def _warn_of_loglikelihood(self) -> None:
        if self._engine_name != TRANSFORMERS:
            no_loglikelihoods(self._engine_name, str(self.pretrained))
        self._warn("Log-likelihood requests: scored by the language model alone; the reward model is not used.")

    # Chat templates

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> ChatPrompt:
        """The rendered prompt, which keeps its messages for the reward model."""
        self._uses_chat_template = True
        messages = [dict(message) for message in chat_history]
        theirs = super().apply_chat_template
        text = chat_templates.rendered("the language model", lambda: theirs(chat_history, add_generation_prompt))
        return ChatPrompt(text, messages, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        # lm-eval's request cache goes by this name, and what --model hf put there has no messages
        return f"{super().tokenizer_name}__specrej"

    @property
    def max_gen_toks(self) -> int:
        return self.run_config.max_gen_toks

    # lm-eval's answer cache (--use_cache)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuse a cache that other arguments have filled: its keys are prompts and gen_kwargs alone.

        Raises:
            ConfigError: the cache holds answers of another model, or of ours with other arguments.
        """
        if cache_hook.dbdict is not None:
            if self.run_config.join:
                raise _cache_of_several()
            ours = self.fingerprint()
            theirs = cache_hook.dbdict.get(FINGERPRINT)
            if theirs is None and len(cache_hook.dbdict):
                raise _stale_cache("it was filled by another model")
            if theirs is None:
                cache_hook.dbdict[FINGERPRINT] = ours
            else:  # it stays that of the oldest answer here: what it did not know stays unknown
                found = fingerprint.compare(theirs, ours)
                if found.changed:
                    raise _stale_cache(f"it was filled with other arguments or files ({'; '.join(found.changed)})")
                for warning in fingerprint.warnings_of(found, what="the --use_cache file"):
                    self._warn(warning[0].upper() + warning[1:])
            if text := fingerprint.uncovered(ours):
                self._warn(text)
        super().set_cache_hook(cache_hook)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that answers in lm-eval's cache depend on, beside their prompts and gen_kwargs.

        What gen_kwargs may add to is held as it was given, and so is what decides how a task's own arguments count.
        """
        return self._from_first_rank(
            lambda: self.plan.fingerprint(
                **{name: getattr(self.run_config, name) for name in ("alpha", "n", *names(Decides.TASKS))}
            )
        )

    def _from_first_rank(self, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        with self._needs_all_ranks():
            return fingerprint.from_first_rank(compute, rank=self.rank, world_size=self.world_size)

    def _refuse_cached_repeats(self, requests: Sequence[Any]) -> None:
        if self.cache_hook.dbdict is None:
            return
        for request in requests:
            if (request.repeats or 1) > 1 and not request.args[1].get("do_sample", False):
                raise ConfigError(
                    f"task {request.task_name!r} wants {request.repeats} draws per prompt; --use_cache keeps one.",
                    hint="leave out --use_cache; journal=FILE in --model_args keeps every draw.",
                )

    # Results

    def barrier(self) -> None:
        """Wait for the other ranks. lm-eval calls it on all of them after each kind of request: time to add up.

        Raises:
            RankError: one of them has died; so do the other calls that need all ranks.
        """
        with self._needs_all_ranks():
            super().barrier()
        if self.world_size > 1:
            self._ranks = self.gather_object(self.tally) or []

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        with self._needs_all_ranks():
            gathered: torch.Tensor = super().all_gather(tensor)
            return gathered

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        with self._needs_all_ranks():
            gathered: list[Any] | None = super().gather_object(obj, dst)
            return gathered

    def _needs_all_ranks(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._watch is None else self._watch.guard()

    def get_model_info(self) -> dict[str, Any]:
        """What goes into the results file beside HFLM's own: our arguments, costs and warnings."""
        tally = Tally.merged(self._ranks or [self.tally])
        described = self.generator.describe()
        reward_model = described.pop("reward_model")
        audit = tally.audits.estimate()
        block = {
            "arguments": {**self.run_config.to_dict(), **tally.resolved_first()},
            "seed_from": self.seed_from,
            "totals": {**tally.totals.to_dict(), "requests": tally.num_requests},
            "spent": tally.spent.to_dict(),
            **({} if audit is None else {"audit": audit.to_dict()}),
            "prompts_in_flight": self.generator.prompts_in_flight,
            "mean_reward": tally.mean_reward,
            "per_task": {name: task.to_dict() for name, task in sorted(tally.tasks.items())},
            "warnings": list(tally.warnings.values()),
            "reward_model": reward_model,
            "embedded_demo_pair": self.run_config.pretrained is None,
            "world_size": self.world_size,
            "versions": {name: described.pop(name, None) or fingerprint.version_of(name) for name in VERSIONS},
            "hardware": described,
        }
        return {**super().get_model_info(), "specrej": strict_json(redacted_values(block, put=""))}

    def _warn(self, message: str, *, key: object = None) -> None:
        """Log a warning and keep it for the results, the first time it has cause."""
        if self.tally.warn(message, key=key) and self.rank == 0:
            logger.warning(message)


class BestOfNLM(SpecRejLM):
    """The same with ``strategy=best_of_n``: n rows decoded to the end on the same engine, the best one returned."""

    default_strategy: ClassVar[str] = "best_of_n"


def _cache_of_several() -> ConfigError:
    return ConfigError(
        "--use_cache with join=True: one process at a time writes such a cache.",
        hint="leave it out: journal=FILE keeps every answer, of all processes.",
    )


def _stale_cache(reason: str) -> ConfigError:
    return ConfigError(
        f"--use_cache would return stale answers: {reason}.",
        hint="give this run its own --use_cache path, or delete the old file.",
    )
