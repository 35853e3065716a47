"""The story of a run: set up, then batch, step, log, evaluate, save; export at the end. All side effects are here.

In: a RunConfig and a workdir. Out: the workdir's files (manifest, metrics, samples, checkpoints, export), an Outcome.
Called again on the same workdir, it goes on where the last good checkpoint left off.
"""

import contextlib
import dataclasses
import fcntl
import logging
import pathlib
import shlex
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from jax_sft.agreement import check_agreement
from jax_sft.checkpoint import Checkpoints
from jax_sft.config import RunConfig, export_dtype
from jax_sft.cost import Clock
from jax_sft.data.loader import Loader
from jax_sft.data.stream.loader import StreamLoader
from jax_sft.disk import told_if_full
from jax_sft.evaluate.losses import Losses
from jax_sft.evaluations import Evaluations, asked_of, fingerprint_of, forget_after
from jax_sft.exam import make_exam
from jax_sft.export import Export, training_facts, write_trained
from jax_sft.hf.load import Pretrained
from jax_sft.hf.push import check_push, push
from jax_sft.hf.save import check_destination, check_shard_size
from jax_sft.hf.save_adapter import check_form
from jax_sft.manifest import write_cost, write_manifest
from jax_sft.memory_plan import device_limit, plan_memory
from jax_sft.metrics import Metrics
from jax_sft.model.config_fields import dropouts
from jax_sft.model.decoder import build
from jax_sft.model.ropes import unread_by_transformers
from jax_sft.optim import optimizer, schedule
from jax_sft.origin import keep, texts_of
from jax_sft.parameters import Parameters, load_base, parameters
from jax_sft.report.run import report
from jax_sft.run_data import (
    load_sets,
    measured_by,
    rates,
    resume_fingerprint,
    stage_line,
    training_loader,
    validation_loader,
)
from jax_sft.run_progress import RunProgress
from jax_sft.sharding import abstract_batch, batch_shards, local_rows, make_mesh, put_batch
from jax_sft.signals import Signals, StoppedError
from jax_sft.step_log import StepLog
from jax_sft.stream_state import gathered_states, tell_account
from jax_sft.train_step import (
    Pull,
    TrainState,
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
    state_shardings,
)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    finished: bool  # False: saved on a signal; start again to go on
    step: int
    workdir: pathlib.Path
    export: pathlib.Path | None
    before: Losses | None  # validation, untrained model
    after: Losses | None


@dataclasses.dataclass
class _Run:
    """What is set up once."""

    config: RunConfig
    workdir: pathlib.Path
    mesh: Mesh
    base: Pretrained
    plan: Parameters
    frozen: Any  # what is not trained of the model
    origin: Any  # what it is drawn to: the trained tree as it started; None if it is not
    graphdef: Any
    sources: tuple[str, ...]
    loader: Loader | StreamLoader
    evaluations: Evaluations
    checkpoints: Checkpoints
    tx: optax.GradientTransformationExtraArgs
    train_step: jax.stages.Wrapped
    lr_at: Callable[[Any], Any]


def train(config: RunConfig, workdir: pathlib.Path, *, command: str) -> Outcome:
    """Fine-tune as the config says; resume if the workdir holds a checkpoint.

    Raises:
        ValueError: anything a user can mend (data, config, model folder, a loss that is not finite).
        OSError: the workdir cannot be written; the last good checkpoint stays.
    """
    with Signals() as signals, told_if_full(workdir):
        try:
            return _train(config, workdir, command, signals)
        except StoppedError:
            _log.info("stopped between checkpoints; what is saved stays, run the same command again to go on")
            return Outcome(False, 0, workdir, None, None, None)


def _train(config: RunConfig, workdir: pathlib.Path, command: str, signals: Signals) -> Outcome:
    """Set up and run."""
    started = time.perf_counter()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{workdir}: cannot be made a workdir ({error.strerror}); name another folder") from error
    with _alone(workdir):
        return _train_alone(config, workdir, command, signals, started)


def _train_alone(config: RunConfig, workdir: pathlib.Path, command: str, signals: Signals, started: float) -> Outcome:
    check_shard_size(config.export.max_shard_size)
    _first_process_does(lambda: _check_ends(config, workdir), what="what the first process checks first")
    mesh = make_mesh(config.mesh)
    base = load_base(config)
    for name, value in dropouts(base.hf_config).items():
        _log.info("config.json names %s = %s: no dropout is applied in training", name, value)
    for name, value in unread_by_transformers(base.hf_config).items():
        _log.info("config.json names %s = %s: transformers does not read it, and neither is it read here", name, value)
    plan = parameters(config, base)
    if plan.lora is not None and config.export.format == "adapter":
        check_form(plan.lora, plan.in_full, base.config)
    for line in plan.lines():
        _log.info(line)
    train_set, validation_set = load_sets(config, base.template, workdir, max_positions=base.config.max_positions)
    fingerprint = resume_fingerprint(config, base, train_set) | plan.fingerprint
    measured = validation_set.fingerprint if validation_set else None
    asked = asked_of(config, base)
    texts = texts_of(config.evaluate.forgetting)
    measured_hashes = {
        "answers": fingerprint_of(asked, config.evaluate.max_new_tokens),
        "forgetting": fingerprint_of(texts, config.evaluate.forgetting.task_batches),
    }
    check_agreement({"config": _told(config), "validation": measured, "measured": measured_hashes} | fingerprint)
    sources = tuple(sorted({*train_set.sources, *(validation_set.sources if validation_set else ())}))
    loader = training_loader(config, train_set, sources, base.template)
    for line in loader.mixture_lines():
        _log.info(line)
    rows = local_rows(mesh, batch_size=config.train.batch_size, accumulation=config.train.accumulation)

    with jax.set_mesh(mesh):
        graphdef = build(base.config, dtype=config.model.dtype, attention=config.model.attention, lora=plan.lora)
        params_shape = plan.abstract_trained
        tx = optimizer(
            config.optim,
            loader.total_steps,
            params_shape,
            stages=rates(config, loader),
            b_lr_ratio=config.lora.b_lr_ratio,
            frozen_layers=plan.frozen_layers,
        )
        state_shape = abstract_state(params_shape, tx, mesh, averaged=config.train.is_averaged)
        checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint, fingerprint=fingerprint)
        restored = checkpoints.restore(state_shape)
        if restored is None:
            start_step, progress = 0, RunProgress()
            progress.validation = measured_by(config, validation_set, measured_hashes)
            trained, frozen = plan.load(base, mesh, seed=config.seed)
            state = init_state(trained, tx, mesh, averaged=config.train.is_averaged)
        else:
            start_step, state, notes = restored
            frozen = plan.load_frozen(base, mesh)
            progress = RunProgress.from_notes(notes)
            if progress.owed_step != start_step:  # made up for by an earlier start
                progress.owed_step = -1
            progress.compare_validation(measured_by(config, validation_set, measured_hashes))
            checkpoints.count_losses_of(progress.validation)
            if isinstance(loader, StreamLoader):
                loader.go_on_from(progress.lanes)
            _log.info("resuming from step %d of %d in %s", start_step, loader.total_steps, workdir)
        progress.base = config.model.path
        validation = validation_loader(config, validation_set, sources) if validation_set else None
        kept = keep(
            state.params if restored is None else None,
            frozen,
            graphdef=graphdef,
            config=config,
            plan=plan,
            base=base,
            mesh=mesh,
            texts=texts,
            validation=validation,
        )
        run = _Run(
            config=config,
            workdir=workdir,
            mesh=mesh,
            base=base,
            plan=plan,
            frozen=frozen,
            graphdef=graphdef,
            sources=sources,
            loader=loader,
            evaluations=Evaluations(
                config=config,
                workdir=workdir,
                mesh=mesh,
                base=base,
                graphdef=graphdef,
                frozen=frozen,
                validation=validation,
                sources=sources,
                eval_step=make_eval_step(
                    graphdef, num_sources=len(sources), loss_chunk_tokens=config.train.loss_chunk_tokens, mesh=mesh
                ),
                asked=asked,
                watched=kept.watched,
            ),
            origin=None if kept.pulls is None else kept.pulls.params,
            checkpoints=checkpoints,
            tx=tx,
            train_step=make_train_step(
                graphdef,
                tx,
                num_sources=len(sources),
                remat=config.train.remat,
                loss_chunk_tokens=config.train.loss_chunk_tokens,
                mesh=mesh,
                state_shardings=state_shardings(params_shape, tx, mesh, averaged=config.train.is_averaged),
                dropout_seed=config.seed if plan.lora is not None and plan.lora.dropout > 0 else None,
                frozen_layers=plan.frozen_layers,
                ema_decay=config.train.ema_decay,
                pull=None if kept.pulls is None else Pull(kept.pulls.graphdef, config.train.base_kl),
            ),
            lr_at=schedule(config.optim, loader.total_steps, stages=rates(config, loader)),
        )
        if jax.process_index() == 0:
            write_manifest(
                workdir,
                config=config,
                sets={"train": train_set, "validation": validation_set},
                total_steps=loader.total_steps,
                start_step=start_step,
                command=command,
            )
        forget_after(workdir, None if restored is None else start_step, owed_step=progress.owed_step)
        metrics = Metrics(
            workdir,
            start_step=None if restored is None else start_step,
            owed_step=progress.owed_step,
            tensorboard=config.log.tensorboard,
            wandb_project=config.log.wandb_project,
            config=config.to_dict(),
        )
        with contextlib.closing(checkpoints), contextlib.closing(metrics):
            signals.stop_if_received()
            return _steps(run, state, metrics, rows, start_step, progress, signals, started)


def _first_process_does(check: Callable[[], Any], *, what: str) -> None:
    """Let process 0 check, and all processes stop if it fails: the others would wait for it in vain.

    Raises:
        ValueError: of the check, on process 0; elsewhere one that points there.
    """
    failure = None
    if jax.process_index() == 0:
        try:
            check()
        except ValueError as error:
            failure = error
    if jax.process_count() > 1 and not multihost_utils.broadcast_one_to_all(np.int32(failure is None)):
        raise failure or ValueError(f"process {jax.process_index()}: {what} failed; see the message of process 0")
    if failure is not None:
        raise failure


def _told(config: RunConfig) -> dict[str, Any]:
    """The config, without what each process may have otherwise."""
    said = dataclasses.asdict(config)
    return said | {"data": {k: v for k, v in said["data"].items() if k not in ("cache", "workers")}}


def _check_ends(config: RunConfig, workdir: pathlib.Path) -> None:
    """What the end of the run needs is there before its beginning."""
    check_destination(workdir / "export")
    adapter = config.lora.adapter
    if adapter is not None and pathlib.Path(adapter).expanduser().resolve() == (workdir / "export").resolve():
        raise ValueError(
            f"lora.adapter = {adapter!r} is where this run puts its own export, which would replace it; name another "
            "workdir"
        )
    if config.export.push_to is not None:
        check_push(config.export.push_to)


@contextlib.contextmanager
def _alone(workdir: pathlib.Path) -> Iterator[None]:
    """One run at a time works in a workdir; the lock goes with the process, however it ends.

    Raises:
        ValueError: another run works there.
    """
    if jax.process_index() > 0:
        yield
        return
    with (workdir / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{workdir}: another run is at work there; wait for it, or name another workdir"
            ) from error
        except OSError:
            _log.warning("%s: cannot be locked on this file system; see that no other run uses it", workdir)
        yield


def _steps(
    run: _Run,
    state: TrainState,
    metrics: Metrics,
    rows: np.ndarray,
    start_step: int,
    progress: RunProgress,
    signals: Signals,
    started: float,
) -> Outcome:
    """The loop itself."""
    config, total = run.config, run.loader.total_steps
    if progress.is_over(config):
        total = start_step
    if start_step < total:
        _log_memory_plan(run, state, start_step)
    clock = Clock(started)
    clock.set_up()
    if start_step in (0, progress.owed_step):
        with clock.part("evaluating"):
            _evaluate(run, state.weights, metrics, progress, start_step)
        if start_step and progress.after_loss is not None:
            progress.late_losses[str(start_step)] = progress.after_loss
        if progress.is_over(config):
            total = start_step
        signals.stop_if_received()
    for step, loss in progress.late_losses.items():
        run.checkpoints.note_loss(int(step), loss)
    state = _at_stage(run, state, progress, start_step)
    log = StepLog(
        metrics,
        loader=run.loader,
        flops_of=run.plan.train_flops,
        lr_at=run.lr_at,
        every_steps=config.log.every_steps,
        nonfinite=config.train.nonfinite,
        started=started,
    )
    done, stop = start_step, False
    bar = tqdm(total=total, initial=done, desc="training", unit="step", disable=jax.process_index() > 0, smoothing=0.1)
    with signals.collected(), bar:
        for step, batch in run.loader.prefetch(start_step, total, rows=rows):
            placed = put_batch(
                batch,
                run.mesh,
                rows=rows,
                batch_size=config.train.batch_size,
                accumulation=config.train.accumulation,
            )
            state, measured = run.train_step(state, run.frozen, placed, run.origin)
            done = step + 1
            # Step n runs on the device while the numbers of step n - 1 are read: the device never waits for the host.
            progress.count(*log.finish_pending(bar))
            log.pend(step, measured)

            stop = signals.received or run.checkpoints.reached_preemption(done)
            stage_ends = done in run.loader.stage_ends
            evaluate_now = stage_ends or _is_due(done, config.evaluate.every_steps)
            save_now = stop or stage_ends or _is_due(done, config.checkpoint.every_steps)
            if not (evaluate_now or save_now):
                continue
            progress.count(*log.finish_pending(bar))
            with log.paused():
                best_loss = None
                if evaluate_now and stop:  # there may be seconds left: save, and evaluate at the next start
                    progress.owed_step = done
                elif evaluate_now:
                    with clock.part("evaluating"):
                        best_loss = _evaluate(run, state.weights, metrics, progress, done)
                    if progress.is_over(config):
                        total = done
                    if isinstance(run.loader, StreamLoader):
                        tell_account(run.loader, metrics, done)
                save_now = save_now or best_loss is not None or done == total
                if save_now and isinstance(run.loader, StreamLoader):
                    progress.lanes = gathered_states(run.loader, done, rows)
                if save_now:
                    loss = progress.after_loss if progress.after_step == done else None
                    with clock.part("saving"):
                        run.checkpoints.save(done, state, progress.to_notes(), loss=loss, wait=stop or done == total)
                    stop = stop or signals.received  # it came during the evaluation, and this step is saved
                if not stop:
                    state = _at_stage(run, state, progress, done)
            if stop or done == total:
                run.checkpoints.wait()
                break
    if progress.skipped_steps:
        _log.warning("%d steps were skipped: their loss or gradient was not finite", progress.skipped_steps)
    if stop:
        _log.info("saved step %d of %d; run the same command again to go on", done, total)
        _tell_cost(run, clock, log)
        return Outcome(False, done, run.workdir, None, progress.before, progress.after)
    if progress.is_over(config):
        _log.info("the training ends at step %d of %d: %s", done, run.loader.total_steps, progress.end(config))
    elif start_step == total:
        _log.info("all %d steps of this run are done; nothing is trained, the export is written again", total)
    with clock.part("exporting"):
        folder = _exported(run, state, metrics, progress, done)
    _tell_cost(run, clock, log)
    _report(run)
    return Outcome(True, done, run.workdir, folder, progress.before, progress.after)


def _tell_cost(run: _Run, clock: Clock, log: StepLog) -> None:
    if jax.process_index() == 0:
        tokens, trained = log.tokens
        write_cost(run.workdir, clock.cost(tokens=tokens, trained_tokens=trained))


def _report(run: _Run) -> None:
    """The page of the run; what keeps it from being written is no fault of the training."""
    if jax.process_index() > 0:
        return
    try:
        for line in report([run.workdir]):
            _log.info(line)
    except (ValueError, OSError) as error:
        _log.warning("report.html is not written: %s; write it with jax-sft report %s", error, run.workdir)


def _evaluate(run: _Run, params: Any, metrics: Metrics, progress: RunProgress, step: int) -> float | None:
    """Measure a step, and remember it. Returns what decides if it is the best so far."""
    found = run.evaluations.at(step, params, metrics)
    trained = progress.trained_mean()
    if trained is not None and found.losses is not None:
        loss = found.losses.loss
        metrics.write(step, {"validation/gap": loss - trained})
        alarm = progress.overfitting(step, loss, trained, rise=run.config.evaluate.overfitting_rise)
        if alarm is not None:
            metrics.write_alarm(alarm)
    return progress.take(found, run.config)


def _exported(run: _Run, state: TrainState, metrics: Metrics, progress: RunProgress, done: int) -> pathlib.Path:
    """Write the export, and push it if the config says so."""
    config = run.config
    jax.tree.map(lambda x: x.delete(), state.opt_state)  # saved; the certificate needs its room
    params, after = _weights_alone(state), progress.after
    ends_early = config.evaluate.patience is not None or config.evaluate.forgetting.may_stop
    weights = config.export.weights or ("best" if ends_early else "last")
    if weights == "best":
        done, params, notes = _best_params(run, params, progress, done)
        if notes is not None:  # those of a step that was evaluated after it was saved know nothing of that
            after = RunProgress.from_notes(notes).after if notes["after_step"] == done else None
        _log.info("the weights of step %d are exported: %s", done, progress.best(config))
    run.evaluations.complete(done, params, metrics)
    name, private, form = config.export.push_to, config.export.push_private, config.export.format or "full"
    export = Export(
        out=run.workdir / "export",
        dtype=config.export.dtype or export_dtype(form),
        max_shard_size=config.export.max_shard_size,
        facts=training_facts(config, done, progress.before, after),
        exam=make_exam(run.base, config.data, config.evaluate.prompts) if config.export.certify else None,
        name=name,
    )
    folder = write_trained(
        run.base,
        run.plan,
        params,
        run.frozen,
        export,
        form=form,
        base_name=config.model.path,
        revision=config.model.revision,
    )
    if name is not None:
        again = ["jax-sft", "export", "--workdir", run.workdir, "--out", folder, "--push-to-hub", name]
        again = shlex.join([*map(str, again), *(["--private"] if private else [])])
        _first_process_does(lambda: push(folder, name, private=private, again=again), what="the push to the hub")
    return folder


def _best_params(run: _Run, params: Any, progress: RunProgress, done: int) -> tuple[int, Any, dict[str, Any] | None]:
    """Step and weights with the lowest validation loss so far, and what the host noted there; None for those of now.

    The weights of now are deleted if they are not the best.
    """
    run.checkpoints.wait()
    loss = progress.after_loss if progress.after_step == done else None
    is_best = loss is not None and loss == progress.best_loss and not progress.waited  # of equals the first
    best = done if is_best else run.checkpoints.best_step
    if best is None or best == done:
        return done, params, None
    shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    jax.tree.map(lambda x: x.delete(), params)
    return run.checkpoints.restore_params(shape, step=best, averaged=run.config.train.is_averaged)


def _weights_alone(state: TrainState) -> Any:
    """What is exported; the weights that it is an average of are deleted."""
    if state.ema is not None:
        jax.tree.map(lambda x: x.delete(), state.params)
    return state.weights


def _at_stage(run: _Run, state: TrainState, progress: RunProgress, done: int) -> TrainState:
    """What the stage that begins after `done` steps starts from; the state as it is where none begins there.

    From the best weights so far the optimizer starts anew: its moments are those of other weights.
    """
    if not run.config.stages or done not in (0, *run.loader.stage_ends[:-1]):
        return state
    number = run.loader.stage_of(done)
    _log.info(stage_line(run.config, run.loader, number))
    if run.config.stages[number].start == "last":
        return state
    jax.tree.map(lambda x: x.delete(), state.opt_state)
    best, params, _ = _best_params(run, _weights_alone(state), progress, done)
    _log.info("it starts from the weights of step %s: %s", best, progress.best(run.config))
    begun = init_state(params, run.tx, run.mesh, averaged=run.config.train.is_averaged)
    return dataclasses.replace(begun, step=state.step)


def _log_memory_plan(run: _Run, state: TrainState, step: int) -> None:
    """Compile the train step, and say what it takes. All batches have one shape; jit finds it compiled at step 1."""
    size, accumulation = run.config.train.batch_size, run.config.train.accumulation
    no_rows = run.loader.batch(step, np.zeros(0, np.int64))
    batch = abstract_batch(no_rows, run.mesh, batch_size=size, accumulation=accumulation)
    plan = plan_memory(
        state,
        run.frozen,
        run.train_step.lower(state, run.frozen, batch, run.origin).compile(),
        origin=run.origin,
        trained_parameters=run.plan.num_trained,
        all_parameters=run.plan.num_params,
        rows=size // accumulation // batch_shards(run.mesh),
        limit_bytes=device_limit(jax.local_devices()[0]),
    )
    for line in plan.lines():
        _log.log(logging.INFO if plan.fits else logging.WARNING, "%s", line)


def _is_due(step: int, every_steps: int | None) -> bool:
    return bool(every_steps) and step % every_steps == 0
