"""Prepare a pair: two model directories that can be loaded, and a few facts about them.

    <cache>/pairs/<name>-…-<key>/ what was made: student/ or teacher/ (generated), model/ (gguf)
    <cache>/problems-<key>/       the generated problems: train.jsonl held_out.jsonl test.jsonl, and
                                  other.jsonl, of another kind;
                                  for pairs that know rules, the same problems answered by a rule
    <cache>/facts/<key>.json      what was checked or measured about a pair's weights
    <cache>/prepared/<key>.json   where a pair's models and problems are (`at_hand` reads it)

A key is a hash of everything that decides the content, so a changed recipe gets another directory.
Nothing is downloaded here: weights that are not on this machine (`hub` can fetch them beforehand)
are an error that says how to get them. torch is imported only if something has to be made or
measured.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stillhouse import fingerprints, local_models, packages
from stillhouse.distill import same_kernels
from stillhouse.distill.cache import Say, fingerprint, made_once, remembered
from stillhouse.distill.tokenizers_match import difference
from stillhouse.distill.toy import problems, tiny
from stillhouse.distill.toy.recipes import RECIPES
from stillhouse.errors import ConfigError, ContractError, nearest
from stillhouse.identity import digest
from stillhouse.local_models import (
    download_command,
    looks_like_hub_id,
    missing_file,
    pinned,
    snapshot,
)
from stillhouse.rundir import Json, file_digest, write_atomic, write_json
from stillhouse.scores import TEST_ROWS
from stillhouse.spec import PairSpec, QuantSpec

NO_COMMITS: Mapping[str, str] = {}
VERSION = 1  # increment it whenever the same pair would give other files or other facts
LEAST_QUANTIZATION_ERROR = 0.01  # below it a self pair's student is its teacher


@dataclass(frozen=True)
class PreparedPair:
    """The location and revision of the two models of a pair, and facts about them."""

    student: str  # for from_pretrained: a directory, or a hub id whose files are on this machine
    teacher: str
    student_revision: str | None  # a commit, a package's version, a digest of generated weights;
    teacher_revision: str | None  # None for a directory that this package did not write
    data_dir: Path  # train.jsonl held_out.jsonl test.jsonl other.jsonl of the generated problems
    facts: dict[str, Any]  # e.g. quantization_error, for a self pair with a quantizer
    student_weights: str | None = None  # their digest (fingerprints); None: the commit is enough

    @property
    def is_self(self) -> bool:
        """Whether the student's base and the teacher are the same weights."""
        return self.student == self.teacher and self.student_revision == self.teacher_revision


@dataclass(frozen=True)
class _Weights:
    name: str
    revision: str | None
    directory: Path


def prepare(
    pair: PairSpec, quant: QuantSpec, cache_dir: Path, commits: Mapping[str, str] = NO_COMMITS
) -> PreparedPair:
    """Make or find the pair's models; the second call takes milliseconds for what was made here.

    `commits`: the commits that open hub revisions stand for (`place.commits`).
    Safe to call from several processes at once: one works, the others wait and log that.
    Raises ConfigError if weights are not on this machine or the quantizer barely changes them, and
    ContractError if the tokenizers differ or the cache is damaged.
    """

    def say(line: str) -> None:
        print(f"pair {pair.pair_name}: {line}", flush=True)

    if pair.pair_source == "generated":
        student, teacher, facts = _generated(pair, cache_dir, say)
    elif pair.pair_source == "gguf":
        student, teacher, facts = _from_package(pair, cache_dir, say)
    else:
        student, teacher, facts = _at_hand_pair(pair, cache_dir, commits)
    for role, revision, weights in (
        ("student", pair.student_revision, student),
        ("teacher", pair.teacher_revision, teacher),
    ):
        _check_revision(pair, role, revision, weights)
    prepared = PreparedPair(
        student.name,
        teacher.name,
        student.revision,
        teacher.revision,
        _problem_files(cache_dir, _rule(pair), _asks(pair)),
        dict(facts),
        _digest_of(pair, student, cache_dir),
    )
    _say_where(pair, student, teacher, prepared, cache_dir)
    if prepared.is_self and quant.quant_type != "none":
        error = _quantization_error(pair, quant, student, cache_dir, say)
        stored = f"{quant.quant_type} in groups of {quant.quant_group_size}"
        say(f"{stored} changes its weights by {error:.2%} (||Q(W)-W||/||W||)")
        prepared.facts["quantization_error"] = error
    return prepared


def require(pair: PairSpec, cache_dir: Path, commits: Mapping[str, str]) -> None:
    """Check that the pair's weights are on this machine, or can be made here; loads nothing.

    Raises ConfigError if they are not, with the command that gets them.
    """
    if pair.pair_source == "hub":
        _at_hand(pair, "student", pair.student, pair.student_revision, commits)
        _at_hand(pair, "teacher", pair.teacher, pair.teacher_revision, commits)
    elif pair.pair_source == "gguf":
        _package(pair, cache_dir)


def _digest_of(pair: PairSpec, weights: _Weights, cache_dir: Path) -> str | None:
    if pair.pair_source == "hub" and weights.revision is not None:
        return None
    return fingerprints.of_weights(weights.directory, cache_dir)


def _say_where(
    pair: PairSpec, student: _Weights, teacher: _Weights, made: PreparedPair, cache_dir: Path
) -> None:
    """Record the paths and the facts about the weights, for `at_hand`."""

    def place(path: Path) -> str:
        here = path.absolute()
        home = cache_dir.absolute()
        return str(here.relative_to(home) if here.is_relative_to(home) else here)

    said = {
        "student": place(student.directory),
        "teacher": place(teacher.directory),
        "problems": place(made.data_dir),
        "facts": made.facts,
    }
    if local_models.prepared(pair, cache_dir) != said:
        write_json(local_models.prepared_file(pair, cache_dir), said)


# ---------------------------------------------------------------- three sources


def _generated(pair: PairSpec, cache_dir: Path, say: Say) -> tuple[_Weights, _Weights, Json]:
    wanted = [("teacher", pair.teacher)]
    if pair.student_steps is not None:
        wanted.append(("student", pair.student))
    for role, name in wanted:
        known = [recipe for recipe, roles in RECIPES.items() if role in roles]
        if name not in known:
            raise ConfigError(
                f'pair {pair.pair_name}: no recipe "{name}" for its {role}; there is'
                f" {', '.join(known)}.{nearest(name, known)}"
            )
    seed, student_steps, teacher_steps = pair.pair_seed, pair.student_steps, pair.teacher_steps
    if seed is None or teacher_steps is None:
        raise ConfigError(
            f"pair {pair.pair_name}: a generated pair needs pair_seed and teacher_steps, got {seed}"
            f" and {teacher_steps}"
        )
    if student_steps is None and pair.student != pair.teacher:
        raise ConfigError(
            f"pair {pair.pair_name}: student {pair.student} without student_steps is the teacher's"
            f" own weights, and the teacher is {pair.teacher}; name one recipe twice, or give"
            " student_steps"
        )
    parts = [(pair.teacher, "teacher", teacher_steps)]
    parts += [] if student_steps is None else [(pair.student, "student", student_steps)]
    made = _at_once([partial(_trained, *one, seed, cache_dir, say) for one in parts])
    facts = {name: fact for _, more in made for name, fact in more.items()}
    return made[-1][0], made[0][0], facts


def _at_once(works: Sequence[Callable[[], tuple[_Weights, Json]]]) -> list[tuple[_Weights, Json]]:
    """Run the functions in parallel threads, and return their results in order.

    Each waits for a single-threaded process.
    """
    with ThreadPoolExecutor(len(works)) as threads:
        try:
            return [one.result() for one in [threads.submit(work) for work in works]]
        except BaseException:
            same_kernels.stop()  # otherwise the exit would wait for the others
            raise


def _trained(
    name: str, role: str, steps: int, seed: int, cache_dir: Path, say: Say
) -> tuple[_Weights, Json]:
    """One model, made once; pairs that share it find it."""
    recipe = RECIPES[name][role]

    def make(into: Path) -> Json:
        say(f"training its {role}, once")
        facts = tiny.make(recipe, steps, seed, into / role, lambda line: say(f"{role} {line}"))
        return facts | {"revision": file_digest(into / role / "model.safetensors")[:16]}

    # Names, precisions, few-shot counts, and `asks` are not part of the key: they do not change the
    # weights.
    made_of = {k: v for k, v in asdict(recipe).items() if k != "asks" and v != ()}
    key = digest([VERSION, tiny.VERSION, seed, steps, made_of])[:10]
    home = cache_dir / "pairs" / f"{name}-{role}-{key}"
    facts = made_once(home, say, make)
    weights = _Weights(str(home / role), facts["revision"], home / role)
    return weights, {f"{role}_{fact}": facts[fact] for fact in ("loss", "seconds")}


def _package(pair: PairSpec, cache_dir: Path) -> tuple[str, list[Path]]:
    """The version of the package that brings a gguf pair's weights, and the file's parts."""
    if pair.student != pair.teacher:
        raise ConfigError(
            f"pair {pair.pair_name}: a gguf pair is one model against itself, got student"
            f" {pair.student} and teacher {pair.teacher}"
        )
    name = pair.student.replace("_", "-")
    try:
        found = packages.find(name, cache_dir)
    except ConfigError as error:
        raise ConfigError(
            f"pair {pair.pair_name}: its weights come in a package, and {error}"
        ) from error
    return packages.PACKAGES[name].version, [f for f in found.values() if ".gguf" in f.name]


def _from_package(pair: PairSpec, cache_dir: Path, say: Say) -> tuple[_Weights, _Weights, Json]:
    version, parts = _package(pair, cache_dir)
    packages.let_import("gguf", cache_dir)
    name = parts[0].name.removesuffix(".part00")
    content = [VERSION, pair.student, version, name, sum(part.stat().st_size for part in parts)]
    home = cache_dir / "pairs" / f"{pair.student}-{digest(content)[:10]}"

    def make(into: Path) -> Json:
        say(f"unpacking {name}, once")
        if len(parts) == 1:
            _unpack_gguf(parts[0], into / "model")
            return {}
        with tempfile.TemporaryDirectory(dir=into) as beside:
            whole = Path(beside) / name
            whole.write_bytes(b"".join(part.read_bytes() for part in parts))
            _unpack_gguf(whole, into / "model")
        return {}

    facts = made_once(home, say, make)
    weights = _Weights(str(home / "model"), version, home / "model")
    return weights, weights, facts


def _unpack_gguf(file: Path, into: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

    # Its reader's bar heeds no setting of transformers'.
    reader: Any = modeling_gguf_pytorch_utils
    reader.tqdm = partial(reader.tqdm, disable=True)
    with tiny.no_bars():
        packed: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        # A model loaded from a gguf file cannot be saved; a new model with its tensors can.
        config = packed.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = type(packed)(config)
        model.load_state_dict(packed.state_dict())
        model.save_pretrained(into)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(into)


def _at_hand_pair(
    pair: PairSpec, cache_dir: Path, commits: Mapping[str, str]
) -> tuple[_Weights, _Weights, Json]:
    student = _at_hand(pair, "student", pair.student, pair.student_revision, commits)
    teacher = _at_hand(pair, "teacher", pair.teacher, pair.teacher_revision, commits)
    if student.directory == teacher.directory:
        return student, teacher, {}
    content = [VERSION, "tokenizers", *map(fingerprint, (student.directory, teacher.directory))]

    def compare() -> Json:
        found = difference(_tokenizer(pair, student), _tokenizer(pair, teacher))
        if found is not None:
            raise ContractError(
                f"pair {pair.pair_name}: the tokenizers of student {student.name} and teacher"
                f" {teacher.name} differ, so their probabilities cannot be compared: {found}; what"
                " is needed is two models with the same tokenizer"
            )
        return {"tokenizers": "equal"}

    return student, teacher, remembered(cache_dir, content, compare)


def _at_hand(
    pair: PairSpec, role: str, name: str, revision: str | None, commits: Mapping[str, str]
) -> _Weights:
    local = Path(name).expanduser()
    if local.is_dir():
        if missing := missing_file(local):
            raise ConfigError(f"pair {pair.pair_name}: {role} {name} has no {missing}")
        return _Weights(str(local), None, local)
    if not looks_like_hub_id(name):
        raise ConfigError(
            f"pair {pair.pair_name}: {role} {name}: no such directory, and not an owner/name id"
        )
    revision = pinned(commits, name, revision, "model")
    found = snapshot(name, revision, "model")
    if found is None or (missing := missing_file(found)):
        what = "its weights are" if found is None else f"{missing} is"
        raise ConfigError(
            f"pair {pair.pair_name}: {role} {name}: {what} not on this machine; get it with"
            f" {download_command(name, revision, 'model')}"
        )
    return _Weights(name, found.name, found)


def _check_revision(pair: PairSpec, role: str, pinned: str | None, weights: _Weights) -> None:
    found = weights.revision
    if pinned is not None and found != pinned and pair.pair_source != "hub":
        raise ConfigError(
            f"pair {pair.pair_name}: {role}_revision is {pinned}, here is {found};"
            " use that, or null"
        )
    if pinned is not None and found is None:
        raise ConfigError(
            f"pair {pair.pair_name}: {role}_revision is {pinned}, but {weights.name} is a"
            " directory, which has no revisions; use null"
        )


def _tokenizer(pair: PairSpec, weights: _Weights) -> Any:
    from stillhouse.distill import loading

    try:
        return loading.tokenizer(weights.directory)
    except ContractError as error:
        raise ContractError(f"pair {pair.pair_name}: {error}") from error


# ---------------------------------------------------------------- what is kept


def _rule(pair: PairSpec) -> problems.Rule | None:
    """The rule that the answers on disk follow; None: they are plain arithmetic."""
    if pair.pair_source != "generated" or RECIPES[pair.teacher]["teacher"].turns == 1:
        return None
    return problems.RULE


def _asks(pair: PairSpec) -> tuple[problems.Kind, ...]:
    if pair.pair_source != "generated":
        return problems.ASKED
    return RECIPES[pair.teacher]["teacher"].asks


def _problem_files(
    cache_dir: Path, rule: problems.Rule | None, kinds: tuple[problems.Kind, ...]
) -> Path:
    """The directory of the generated problems; pairs of real models have one, too."""
    content = [VERSION, tiny.VERSION, "other", rule, kinds]
    home = cache_dir / f"problems-{digest(content)[:10]}"

    def make(into: Path) -> Json:
        rows = {
            "train": problems.chat_rows("train", problems.TRAIN_ROWS, rule, kinds),
            "other": problems.other_rows(problems.OTHER_ROWS),
            "held_out": problems.chat_rows("held_out", problems.HELD_OUT_ROWS, rule, kinds),
            "test": problems.test_rows(TEST_ROWS, rule, kinds),
        }
        for name, entries in rows.items():
            text = "".join(json.dumps(entry) + "\n" for entry in entries)
            write_atomic(into / f"{name}.jsonl", text.encode())
        return {}

    made_once(home, lambda line: None, make)
    return home


def _quantization_error(
    pair: PairSpec, quant: QuantSpec, weights: _Weights, cache_dir: Path, say: Say
) -> float:
    """||Q(W) - W|| / ||W|| of the student; measured once per weights and quantizer."""
    content = [VERSION, pair.student_dtype, asdict(quant), fingerprint(weights.directory)]

    def measure() -> Json:
        import torch

        from stillhouse.distill import loading
        from stillhouse.distill.quant import quantization_error

        say(f"measuring what {quant.quant_type} does to its weights, once")
        with tiny.no_bars():
            model = loading.causal_lm(weights.directory, None, getattr(torch, pair.student_dtype))
        return {"quantization_error": quantization_error(model, quant)}

    error = remembered(cache_dir, content, measure, quantization_error=float)["quantization_error"]
    if not error >= LEAST_QUANTIZATION_ERROR:
        raise ConfigError(
            f"pair {pair.pair_name}: quant_type {quant.quant_type} (group"
            f" {quant.quant_group_size}) changes these weights by only {error:.2%}, at least"
            f" {LEAST_QUANTIZATION_ERROR:.0%} is needed (||Q(W)-W||/||W||): student and teacher"
            " would be one model; choose another quantiser with quant=NAME"
        )
    return error
