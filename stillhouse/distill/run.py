"""Run one training job: load models and data, train, save checkpoints, resume, and finish."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence

import torch
from accelerate import PartialState

from stillhouse.distill import checkpoint, models
from stillhouse.distill.agreement import ranking
from stillhouse.distill.curriculum import Choice
from stillhouse.distill.layers import coverage
from stillhouse.distill.loaded import load
from stillhouse.distill.loop import Loop, check_first_step
from stillhouse.distill.monitor import Monitor
from stillhouse.distill.teacher import difference
from stillhouse.distill.tracking import Tracker, finite
from stillhouse.errors import ContractError, Diverged, Interrupted, OutOfMemory, Stopped
from stillhouse.file_formats import TEACHER, checked
from stillhouse.rundir import Json, RunDir, new_record, now, write_json
from stillhouse.sources import drift, refusal
from stillhouse.spec import TrainSpec
from stillhouse.stop import StopFlag
from stillhouse.text import Pace, number_of
from stillhouse.watch_rules import Finding, replayed, stops

TELL_SECONDS = 15.0  # between two progress lines in the log
STATUS_SECONDS = 1.0  # between two updates of the step in status.json: live, at negligible cost


class Run:
    """One process's part in training a point."""

    def __init__(self, spec: TrainSpec, run: RunDir, stop: StopFlag) -> None:
        self.spec, self.dir, self.stop = spec, run, stop
        started = time.perf_counter()
        loaded = load(spec, self._poll)
        self.sources = loaded.sources
        # Weights that had to be made first are known only now.
        if found := drift(run, spec, self.sources):
            raise ContractError(refusal(run, found))
        self.accelerator, self.prepared = loaded.accelerator, loaded.prepared
        self.tokenizer, self.prompts = loaded.tokenizer, loaded.prompts
        self.is_main, self.roles = self.accelerator.is_main_process, loaded.roles
        self._check_teacher()
        self.say(f"data: {self.prompts.summary()}")
        self.student = self.roles.student
        self.coverage = coverage(self.student)
        self.say(f"student: {self.coverage.told(spec.quant.quant_type)}")
        ranked = None
        if spec.rescue.kept_prompts != 1:
            self.say(f"ranking the prompts by {spec.rescue.kept_by}, once")
            ranked = ranking(spec, loaded)
        choice = Choice(spec, self.prompts.train, self.prompts.others or (), ranked)
        self.loop = Loop(
            spec, self.accelerator, self.student, choice, self.roles.writers(),
            self.roles.teacher_scorer(), self.roles.start_scorer(), self.roles.pad_id,
            self.roles.eos_ids,
        )  # fmt: skip
        self.monitor = Monitor(spec, self.loop, self.prompts.held_out, self.tokenizer)
        if spec.method.lmbda != 0:
            self.say(f"rollouts: {self.roles.how()}")
        loading = time.perf_counter() - started
        self.cost: Json = {"seconds": {"load": loading, "total": loading}, "tokens": {}}
        self.said = 0.0
        self.pace, self.told = Pace(), time.monotonic()
        self.pending: Json | None = None  # metrics of an update not yet measured and logged

    def say(self, text: str) -> None:
        """Print one line to the log, from the main process."""
        if self.is_main:
            print(text, flush=True)

    def _check_teacher(self) -> None:
        """Raise ContractError if the teacher is not the one that this run began with."""
        before, here = (self.dir.record() or {}).get("teacher"), self.roles.manifest
        if not before or not here:
            return
        cure = "move the directory away and run again"
        checked(before, TEACHER, self.dir.spec_file, cure)
        if other := difference(before, here):
            raise ContractError(
                f"{self.dir.path}: the teacher is not the one this run began with: {other}."
                f" Restore that, or {cure}"
            )

    def train(self) -> int:
        """Train from the newest complete checkpoint to the end, and save the adapter."""
        average = self.roles.average
        state = checkpoint.load_newest(
            self.dir, self.student, self.loop.optimizer, self.say, average
        )
        first = 0 if state is None else int(state["step"])
        if state is not None:
            self.say(f"going on from step {first}")
            self.loop.sequences.replay.load(state["replay"])
            self.cost = _added(self.cost, state["cost"])
        best = self.dir.status().get("step") or 0
        # Every process applies the rules to reduced metrics, so that all stop at the same step.
        history = [metrics for metrics in self.dir.metrics() if metrics["step"] < first]
        watch, found = replayed(self.spec, history)
        tracker = None
        if self.is_main:
            self._record()
            tracker = Tracker(self.spec, self.dir, first)
        step = first
        self.pending = state and state["pending"]
        try:
            self._heed(found)
            while step < self.spec.training.max_steps or self.pending:
                self._check_stop()
                if self.pending is None:
                    self.pending = self._step(step)
                    step += 1
                metrics = self.pending | self._measure(step - 1)
                self.pending = None
                if tracker is not None:
                    tracker.log(metrics)
                    self._status(step, best)
                    if step % self.spec.training.save_steps == 0:
                        self._save(step)
                self._heed(watch.see(metrics))
        except KeyboardInterrupt:
            raise  # a second Ctrl-C may interrupt an update: save nothing
        except BaseException as error:
            # An error after a request to stop (such as a peer that left first) counts as that stop.
            # The parameters are those of `step` completed updates: an update cannot be interrupted.
            if self.is_main and (self.stop.is_set or isinstance(error, Interrupted | Stopped)):
                self._save(step)
                self.dir.update_status(step=max(step, best))
            if self.stop.is_set and not isinstance(error, Interrupted | Stopped):
                raise Interrupted(
                    "asked to stop; state is saved, run the same line again"
                ) from error
            raise
        finally:
            if tracker is not None:
                tracker.close()
        if self.is_main:
            self._finish(step)
        # Otherwise a process that exits while gloo's threads still run may abort, and a trained run
        # would count as failed (seen once in some hundred exits of two processes).
        self.accelerator.end_training()
        return 0

    def _heed(self, found: Sequence[Finding]) -> None:
        """Log what the watch rules found; raise Stopped if one of them ends the run."""
        for finding in found:
            self.say(f"warning: {finding.text}")
        if found and self.is_main:
            warnings = self.dir.status().get("warnings") or {}
            warnings |= {finding.rule: finding.text for finding in found}
            self.dir.update_status(warnings=warnings)
        for finding in found:
            if stops(self.spec, finding.rule):
                if self.is_main:
                    self.dir.update_status(stopped_by=finding.rule)
                raise Stopped(
                    f"by watch rule {finding.text}; state is saved. To go on, take"
                    f" {finding.rule} from stop_on (or its action) and retry it"
                )

    def _poll(self) -> None:
        """Stop in the middle of a rollout, if no other process waits for this one."""
        if PartialState().num_processes == 1:  # also before the accelerator is here
            self.stop.check()

    def _check_stop(self) -> None:
        """Stop between two steps, all processes at the same one: a process left alone in a gradient
        reduction would wait (with NCCL, forever)."""
        is_set = torch.tensor(float(self.stop.is_set), device=self.accelerator.device)
        if float(self.accelerator.reduce(is_set, "sum")):  # type: ignore[arg-type]
            self.stop.is_set = True
        self.stop.check()

    def _step(self, step: int) -> Json:
        self.loop.clock.seconds.clear()
        started = time.perf_counter()
        metrics = self.loop.gradients(step)
        try:
            # A student that is NaN writes NaN, too: its loss says so first, and the cure is there.
            if not math.isfinite(metrics["train/loss"]):
                loss = metrics["train/loss"]
                raise Diverged(f"step {step}: the loss is {loss}; see diverged.json")
            self.loop.check_rollouts(step)
            if step == 0:
                check_first_step(self.spec, metrics, self.roles.is_same_function)
            metrics |= self.loop.update(step)
            if self.roles.average is not None:
                self.roles.average.update()
        except Diverged:
            self._post_mortem(step, metrics)
            raise
        seconds = {**self.loop.clock.seconds, "step": time.perf_counter() - started}
        for phase, value in seconds.items():
            self._count("seconds", "total" if phase == "step" else phase, value)
        for kind in ("prompt", "completion", "rollout", "teacher"):
            self._count("tokens", kind, metrics[f"tokens/{kind}"])
        times = {f"time/{phase}": round(value, 6) for phase, value in seconds.items()}
        return {"step": step, **metrics, **times}

    def _measure(self, step: int) -> Json:
        """The monitor's metrics after the update of `step`; repeated after an interruption."""
        self.loop.clock.seconds.clear()
        metrics = self.monitor.measure(step)
        spent = self.loop.clock.seconds.get("eval", 0.0)
        if metrics:
            metrics["time/eval"] = round(spent, 6)
            self._count("seconds", "eval", spent)
            self._count("seconds", "total", spent)
        return metrics

    def _count(self, group: str, name: str, value: float) -> None:
        self.cost[group][name] = self.cost[group].get(name, 0.0) + value

    def _record(self) -> None:
        where: Json = {
            "versions": models.versions(),
            "threads": torch.get_num_threads(),
            "device": str(self.accelerator.device),
            **models.machine(),
        }
        record = self.dir.record()
        if record is None:
            record = new_record(self.spec, where["versions"]) | where
            record["sources"] = self.sources
            record["teacher"] = self.roles.manifest
            record["prepared"] = {"facts": self.prepared.facts, "rows": len(self.prompts.train)}
            record["coverage"] = self.coverage.as_json()
            record["skipped_rows"] = self.prompts.skipped
            write_json(self.dir.spec_file, record)
        elif others := _elsewhere(record, where):
            self.say(f"not where this run began: its last digits may be others. Here: {others}")
            went_on = record.setdefault("went_on", [])
            if others not in went_on:
                went_on.append(others)
                write_json(self.dir.spec_file, record)
        self.dir.update_status(phase="training", max_steps=self.spec.training.max_steps)

    def _status(self, step: int, best: int) -> None:
        """Report the step periodically; at once if this attempt gets further than any before."""
        told = self.pace.told(step, self.spec.training.max_steps)
        if time.monotonic() - self.told >= TELL_SECONDS:
            self.told = time.monotonic()
            self.say(told)
        is_progress = step == best + 1
        if is_progress or now() - self.said > STATUS_SECONDS:
            self.said = now()
            fields = {"attempts_without_progress": 0} if step > best else {}
            self.dir.update_status(step=max(step, best), **fields)

    def _save(self, step: int) -> None:
        started = time.perf_counter()
        # Keep the metrics of an update that is not measured yet: a resume measures, then logs.
        replay = self.loop.sequences.replay.state()
        pending = self.pending and finite(self.pending)
        state = {"cost": self.cost, "pending": pending, "replay": replay}
        checkpoint.save(
            self.dir, step, self.student, self.loop.optimizer, state, self.roles.average
        )
        for name in ("save", "total"):
            self._count("seconds", name, time.perf_counter() - started)

    def _post_mortem(self, step: int, metrics: Json) -> None:
        if self.is_main:
            numbers = {k: repr(v) for k, v in metrics.items()}
            batch = [
                {"row": e.row, "prompt_ids": list(e.prompt_ids), "completion_ids": ids}
                for batch in self.loop.batches
                for share in batch.shares
                for e, ids in zip(share.examples, share.written.ids, strict=True)
            ]
            write_json(
                self.dir.path / "diverged.json", {"step": step, "metrics": numbers, "batch": batch}
            )

    def _finish(self, step: int) -> None:
        self.dir.update_status(step=step)
        cost = self.cost | {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "devices": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "price_usd_per_hour": self.spec.site.price_usd_per_hour,
        }
        write_json(self.dir.cost_file, cost)
        models.save_adapter(self.student, self.spec, self.prepared, self.dir.adapter)
        checkpoint.remove_all(
            self.dir
        )  # a trained run never resumes; thousands of points share a disk
        self.say(f"{self.dir.path}: trained, {number_of(step, 'step')}")


def train_run(spec: TrainSpec, run: RunDir, stop: StopFlag) -> int:
    """Train `run` to its end in this process; returns 0 when its adapter is saved.

    Raises:
        StillhouseError: its exit code says whether to try again (errors.py).
    """
    logging.getLogger("transformers.generation").setLevel(logging.ERROR)
    try:
        return Run(spec, run, stop).train()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(_out_of_memory(spec)) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # torch's CPU allocator has no class of its own
            raise OutOfMemory(_out_of_memory(spec)) from error
        raise


def _out_of_memory(spec: TrainSpec) -> str:
    size = spec.training.micro_batch or spec.training.per_device_train_batch_size
    return (
        f"the device's memory cannot hold a micro batch of {size} sequences; the same point with"
        f" micro_batch={max(1, size // 2)} computes the same numbers in less"
    )


def _elsewhere(record: Json, where: Json) -> Json:
    """What differs between this machine and its libraries and those the run began with."""
    before, here = ({**each["versions"], **each} for each in (record, where))
    return {k: v for k, v in here.items() if k != "versions" and before.get(k, v) != v}


def _added(now_: Json, before: Json) -> Json:
    """Costs of this attempt plus those of the attempts before it."""
    return {
        group: {
            name: now_[group].get(name, 0.0) + before[group].get(name, 0.0)
            for name in now_[group] | before[group]
        }
        for group in ("seconds", "tokens")
    }
