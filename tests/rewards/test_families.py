"""Each checkpoint family against its original maths: toy checkpoints under the authors' key names (reward_checkpoints).

PYTHONPATH=tests python tests/rewards/test_families.py    writes tests/golden/reward_templates.json anew
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import GOLDEN
from support.published import PUBLISHED
from support.reward_checkpoints import CASES, HELLO, QUESTION, TEXTS, Case, build, ids_of, llama3_tokenizer, read
from support.rewards import check_reward, make_reward
from support.tiny_models import SOFTCAP, leave_softcaps_out, save, tiny_reward_model, tiny_tokenizer

from specrej_eval.cli import main
from specrej_eval.config import RunConfig
from specrej_eval.core import RowView
from specrej_eval.errors import CheckpointError, ConfigError, RewardError
from specrej_eval.rewards.checkpoints.family import family_names, load_family
from specrej_eval.rewards.checkpoints.reward import CheckpointReward
from specrej_eval.rewards.families import starling
from specrej_eval.rewards.kinds.checkpoint import find_family

TEMPLATES = GOLDEN / "reward_templates.json"
STEPS = "First, take 2.\n\nThen add 2.\n\nSo it is 4."
TWO_TURNS = [*HELLO, {"role": "assistant", "content": "4."}, {"role": "user", "content": "Sure?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *HELLO]
PROCESS = ("rlhflow_prm", "math_shepherd", "qwen_math_prm", "skywork_o1_prm")

each_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of each kind; not to be changed."""
    return {name: build(case, tmp_path_factory.mktemp(name)) for name, case in CASES.items()}


def rows(*texts: str, finish: str | None = "eos") -> list[RowView]:
    return [RowView(i, text, [5], finish) for i, text in enumerate(texts)]  # type: ignore[arg-type]


def loaded(folder: Path, case: Case, **changes: Any) -> CheckpointReward:
    config = RunConfig(pretrained="x").replace(reward_model=str(folder), **{**case.options, **changes})
    reward = make_reward(config, device="cpu")
    assert isinstance(reward, CheckpointReward)
    return reward


def original(case: Case, folder: Path, text: str) -> float:
    return case.score(folder, ids_of(case.tokenizer(), case.text(HELLO, text)))


@each_case
def test_scores_are_those_of_the_original_maths(name: str, folders: dict[str, Path]) -> None:
    case = CASES[name]
    expected = [original(case, folders[name], text) for text in TEXTS]
    assert loaded(folders[name], case).score(HELLO, rows(*TEXTS)) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert max(expected) - min(expected) > 1e-3  # else the comparison says nothing


@each_case
def test_a_batch_scores_as_its_rows_one_by_one(name: str, folders: dict[str, Path]) -> None:
    reward = loaded(folders[name], CASES[name])
    single = [reward.score(HELLO, rows(text))[0] for text in TEXTS]
    assert reward.score(HELLO, rows(*TEXTS)) == pytest.approx(single, rel=1e-5, abs=1e-5)
    assert reward.score(HELLO, rows(*TEXTS[::-1])) == pytest.approx(single[::-1], rel=1e-5, abs=1e-5)


@each_case
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_padding_side_changes_nothing(name: str, side: str, folders: dict[str, Path]) -> None:
    reward = loaded(folders[name], CASES[name])
    expected = reward.score(HELLO, rows(*TEXTS))
    reward.renderer.tokenizer.padding_side = side
    assert reward.score(HELLO, rows(*TEXTS)) == expected


@each_case
def test_what_is_read_is_what_the_authors_wrote_down(name: str, folders: dict[str, Path]) -> None:
    case = CASES[name]
    renderer = loaded(folders[name], case).renderer
    for text in TEXTS:
        (entry,) = renderer.inputs(HELLO, rows(text))
        ids = ids_of(case.tokenizer(), case.text(HELLO, text))
        assert list(entry.ids) == [*ids, *renderer.trailing_ids]


@each_case
def test_the_heads_weights_are_float32_whatever_the_body_is(name: str, folders: dict[str, Path]) -> None:
    reward = loaded(folders[name], CASES[name], reward_dtype="bfloat16")
    assert reward.body.dtype == torch.bfloat16
    assert isinstance(reward.head, torch.nn.Module)
    assert {entry.dtype for entry in reward.head.parameters()} <= {torch.float32}
    scores = torch.tensor(reward.score(HELLO, rows(*TEXTS)))
    assert not torch.equal(scores, scores.bfloat16().float())  # a bfloat16 head could not say them


@each_case
def test_the_family_is_found_without_being_named_and_no_other_claims_it(name: str, folders: dict[str, Path]) -> None:
    case, config = CASES[name], read(folders[name])[0]
    families = {family: load_family(family) for family in family_names()}
    assert find_family(str(folders[name]), config, families) is families[case.family]


@each_case
def test_a_head_that_is_missing_is_an_error_not_random_numbers(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    case = CASES[name]
    folder = changed_weights(folders[name], tmp_path, {case.head_key: None})
    with pytest.raises(CheckpointError, match="no weights for") as caught:
        loaded(folder, case)
    assert case.head_key in str(caught.value)


@each_case
def test_a_head_of_another_shape_is_an_error_that_names_it(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    case = CASES[name]
    tensor = read(folders[name])[1][case.head_key]
    short = tensor[..., :-1] if tensor.dim() > 1 else torch.zeros(len(tensor) + 1)
    folder = changed_weights(folders[name], tmp_path, {case.head_key: short})
    with pytest.raises(CheckpointError, match="has shape") as caught:
        loaded(folder, case)
    assert case.head_key in str(caught.value)


def changed_weights(folder: Path, root: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """A copy of the checkpoint, in one weight file, with tensors exchanged or (None) left out."""
    copy = root / folder.name
    shutil.copytree(folder, copy)
    _, tensors = read(copy)
    raw = [*copy.glob("*.pt"), *copy.glob("*.bin")]
    for path in [*raw, *copy.glob("*.safetensors*")]:
        path.unlink()
    tensors = {key: tensor for key, tensor in {**tensors, **changes}.items() if tensor is not None}
    if raw:
        torch.save(tensors, raw[0])
    else:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, copy / "model.safetensors")
    return copy


@each_case
def test_a_body_without_a_weight_is_an_error(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    case = CASES[name]
    norm = [key for key in read(folders[name])[1] if key.endswith("norm.weight") and "layers" not in key]
    with pytest.raises(CheckpointError, match=r"no weights for norm\.weight"):
        loaded(changed_weights(folders[name], tmp_path, dict.fromkeys(norm)), case)


@each_case
def test_the_bodys_dtype_is_the_checkpoints_unless_given(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    case = CASES[name]
    half = {key: t.bfloat16() if t.is_floating_point() else t for key, t in read(folders[name])[1].items()}
    reward = loaded(changed_weights(folders[name], tmp_path, half), case)  # type: ignore[arg-type]
    assert reward.body.dtype == torch.bfloat16
    assert loaded(folders[name], case).body.dtype == torch.float32


@each_case
def test_a_token_beyond_the_vocabulary_names_the_row(name: str, folders: dict[str, Path]) -> None:
    reward = loaded(folders[name], CASES[name])
    reward.renderer.tokenizer.add_tokens(["brandnew"])
    reward.renderer.vocab_size = min(reward.renderer.vocab_size, len(reward.renderer.tokenizer) - 1)
    with pytest.raises(RewardError, match=r"row 1 has token id \d+, but the model's vocabulary ends at"):
        reward.score(HELLO, rows("4", "brandnew"))


@each_case
def test_an_unfinished_row_is_read_as_asked(name: str, folders: dict[str, Path]) -> None:
    """Open, the template's tail is left out; process reward models and plain texts have none."""
    reward = loaded(folders[name], CASES[name], partial_turn="open")
    live, done = reward.renderer.inputs(HELLO, [*rows("It is", finish=None), RowView(1, "It is", [5], "eos")])
    without_tail = name in ("eurus", "ultrarm", "alpaca_farm", *PROCESS)
    assert (live == done) == without_tail
    tail = len(reward.renderer.trailing_ids)
    text = reward.renderer.tokenizer.decode(live.ids[: len(live.ids) - tail])
    assert without_tail or text.endswith("It is")


@each_case
def test_looks_at_growing_rows_score_as_reading_them_in_full(name: str, folders: dict[str, Path]) -> None:
    """Three looks with a rejection between each: caches change what is read, never the score."""
    answers = ["First, take 2.\n\nThen add 2.\n\nSo it is 4.", "It is\nfour, of course: 🙂 four.", "2 + 2 = 5, so: 5"]
    cached, full = (loaded(folders[name], CASES[name], reward_cache=cache) for cache in ("full", "off"))
    asked = [{"role": "user", "content": 20 * QUESTION}]
    session, live, tokens = cached.open(asked), [0, 1, 2], 0
    for length, dropped in ((9, 2), (21, 1), (100, None)):
        look = [RowView(i, answers[i][:length], [5], None if length < 100 else "eos") for i in live]
        expected = full.score(asked, look)
        assert session.score(look) == pytest.approx(expected, abs=1e-4)
        tokens += sum(len(entry.ids) for entry in full.renderer.inputs(asked, look))
        live = [i for i in live if i != dropped]
        session.keep(live)
    session.close()
    assert cached.tokens_scored < tokens / 2  # it did not simply read everything anew


@each_case
def test_looks_of_several_prompts_read_together_are_the_same_bits(
    name: str, folders: dict[str, Path], counted: Callable[..., None]
) -> None:
    """Two looks of three prompts that begin alike."""
    reward = loaded(folders[name], CASES[name])
    asked = [[{"role": "user", "content": 8 * QUESTION + end}] for end in ("", " And why?", " 🙂")]
    answers = ["First, take 2.\n\nThen add 2.\n\nSo it is 4.", "First, four.\n\nYes", "2 + 2 = 5, so: 5"]

    def scores(*, together: bool) -> list[list[float]]:
        sessions = [reward.open(conversation) for conversation in asked]
        found = []
        for length in (9, 100):
            pool = [RowView(i, text[:length], [5], None if length < 100 else "eos") for i, text in enumerate(answers)]
            if together:
                reward.read_ahead([(session, pool) for session in sessions], exact=True)
            found += [session.score(pool) for session in sessions]
        for session in sessions:
            session.close()
        return found

    assert reward.shared_body is not None and reward.shared_body.exact
    alone = scores(together=False)
    assert scores(together=True) == alone
    counted("scores compared bitwise, together and alone", sum(map(len, alone)))


# positions


@pytest.mark.parametrize("name", ["armorm", "qrm", "qrm-gemma"])
def test_the_gate_is_the_end_of_the_last_user_turn(name: str, folders: dict[str, Path]) -> None:
    case = CASES[name]
    reward = loaded(folders[name], case)
    (entry,) = reward.renderer.inputs(TWO_TURNS, rows("4!"))
    gate, last = reward.positions_of(entry.ids)
    tokenizer = case.tokenizer()
    assert tokenizer.decode(entry.ids[: gate + 1]).endswith(("Sure?<|eot_id|>", "Sure?<end_of_turn>"))
    assert last == len(entry.ids) - 1


@pytest.mark.parametrize("name", ["armorm", "qrm"])
def test_an_answer_that_cuts_the_gate_off_is_a_clear_error(name: str, folders: dict[str, Path]) -> None:
    with pytest.raises(RewardError, match=r"gating network(.|\n)*max_gen_toks"):
        loaded(folders[name], CASES[name]).score(HELLO, rows("x" * 600))


@pytest.mark.parametrize("name", PROCESS)
def test_marks_in_the_prompt_are_no_steps(name: str, folders: dict[str, Path]) -> None:
    """A prompt with line breaks and with the marks' own texts reads as many steps as any other."""
    reward = loaded(folders[name], CASES[name])
    plain = reward.renderer.inputs(HELLO, rows(STEPS))[0].ids
    tricky = [{"role": "user", "content": f"{QUESTION}\n\nки + <extra_0> -\n"}]
    (entry,) = reward.renderer.inputs(tricky, rows(STEPS))
    assert len(reward.positions_of(entry.ids)) == len(reward.positions_of(plain)) >= 3


@pytest.mark.parametrize("name", PROCESS)
@pytest.mark.parametrize("reduce", ["last", "min", "mean", "prod"])
def test_steps_are_made_one_number_in_four_ways(name: str, reduce: str, folders: dict[str, Path]) -> None:
    """Against each step's own probability: the score of the answer that ends with it, prm_reduce=last."""
    case = CASES[name]
    separator = "\n" if name in ("math_shepherd", "skywork_o1_prm") else "\n\n"
    parts = ["Take 2.", "Add 2.", "So 4."]
    last = loaded(folders[name], case, prm_reduce="last")
    steps = [last.score(HELLO, rows(separator.join(parts[: i + 1])))[0] for i in range(3)]
    assert all(0 < step < 1 for step in steps)
    whole = {"last": steps[2], "min": min(steps), "mean": sum(steps) / 3, "prod": steps[0] * steps[1] * steps[2]}
    answer = separator.join(parts)
    (score,) = loaded(folders[name], case, prm_reduce=reduce).score(HELLO, rows(answer))
    assert score == pytest.approx(whole[reduce], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", PROCESS)
@pytest.mark.parametrize("text", ["", "\n\n", "No end yet\n\n", "\n\nA\n\n\n\nB"])
def test_empty_steps_are_left_out(name: str, text: str, folders: dict[str, Path]) -> None:
    reward = loaded(folders[name], CASES[name], prm_reduce="mean")
    (entry,) = reward.renderer.inputs(HELLO, rows(text))
    expected = max(1, sum(bool(part.strip()) for part in text.split("\n\n")))
    if name == "skywork_o1_prm":  # its authors count blank lines in between
        expected = len(text.rstrip("\n").split("\n"))
    assert len(reward.positions_of(entry.ids)) == expected
    (score,) = reward.score(HELLO, rows(text))
    assert 0 < score < 1


@pytest.mark.parametrize("name", PROCESS)
def test_a_prompt_cut_on_the_left_leaves_the_steps(name: str, folders: dict[str, Path]) -> None:
    reward = loaded(folders[name], CASES[name], prm_reduce="mean")
    long = [{"role": "user", "content": "x\n" * 400}]
    (entry,) = reward.renderer.inputs(long, rows(STEPS))
    (short,) = reward.renderer.inputs(HELLO, rows(STEPS))
    assert len(entry.ids) == 512
    whole, cut = reward.positions_of(short.ids), reward.positions_of(entry.ids)
    if name == "rlhflow_prm":  # the first step shares its turn with the question
        assert len(cut) == len(whole)
    else:
        assert [position - len(entry.ids) for position in cut] == [position - len(short.ids) for position in whole]


# files that are not as transformers would have them


def test_weights_published_without_a_config_have_their_bodys(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starling-RM-7B-alpha is one .pt file; config and tokenizer are Llama-2-chat's."""
    case, whole = CASES["starling-7b"], folders["starling-7b"]
    bare = tmp_path / "Starling-RM-7B-alpha"
    bare.mkdir()
    shutil.copy(whole / "starling_rm.pt", bare)
    with pytest.raises(CheckpointError, match="meta-llama/Llama-2-7b-chat-hf"):  # gated, and no network here
        loaded(bare, case)
    monkeypatch.setattr(starling, "CONFIG_ELSEWHERE", {bare.name: str(whole)})
    monkeypatch.setattr(starling, "STARLING_TOKENIZERS", {bare.name: str(whole)})
    assert loaded(bare, case).score(HELLO, rows(*TEXTS)) == loaded(whole, case).score(HELLO, rows(*TEXTS))


def test_a_starling_folder_without_weights_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "Starling-RM-7B-alpha"
    shutil.copytree(folders["starling-7b"], copy)
    (copy / "starling_rm.pt").unlink()
    with pytest.raises(CheckpointError, match="no weight file"):
        loaded(copy, CASES["starling-7b"])


def test_a_language_model_is_no_starling(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "Starling-RM-7B-alpha"
    shutil.copytree(folders["nemotron"], copy)
    with pytest.raises(CheckpointError, match=r"no weights under 'transformer\.'"):
        loaded(copy, CASES["starling-7b"])


def test_alpaca_farm_without_its_backbone_looks_for_the_one_the_reference_code_used(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "reward-model-human"
    shutil.copytree(folders["alpaca_farm"], copy)
    config = json.loads((copy / "config.json").read_text())
    config["backbone_model_name_or_path"] = "/home/somebody/sft10k"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'hmomin/sft10k' is not a folder"):
        loaded(copy, CASES["alpaca_farm"])


def test_a_body_that_transformers_does_not_have_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "inf"
    shutil.copytree(folders["inf_orm"], copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "llamas"}))
    with pytest.raises(CheckpointError, match="transformers has no model of type 'llamas'"):
        loaded(copy, CASES["inf_orm"])


@pytest.mark.parametrize("key", ["reward_token_id", "num_quantiles"])
def test_a_config_without_what_a_family_needs_names_the_key(key: str, folders: dict[str, Path], tmp_path: Path) -> None:
    name = {"reward_token_id": "internlm2_reward", "num_quantiles": "qrm"}[key]
    copy = tmp_path / "incomplete"
    shutil.copytree(folders[name], copy)
    config = json.loads((copy / "config.json").read_text())
    del config[key]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"does not say {key}"):
        loaded(copy, CASES[name], reward_family=CASES[name].family)


def test_a_gating_model_of_another_body_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Where its assistant's turn begins is not known."""
    from support.reward_checkpoints import chatml_tokenizer, random_body, sizes

    tokenizer = chatml_tokenizer()
    folder = tmp_path / "qwen-gating"
    shutil.copytree(folders["armorm"], folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    body = {f"model.{key}": value for key, value in random_body("qwen2", sizes(tokenizer)).items()}
    head = {key: value for key, value in read(folders["armorm"])[1].items() if not key.startswith("model.")}
    save_file({**body, **head}, folder / "model.safetensors")
    config = {**read(folders["armorm"])[0], **sizes(tokenizer), "model_type": "qwen2"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match="known for gemma2, llama, not for model_type 'qwen2'"):
        loaded(folder, CASES["armorm"])


# which family


def test_armorm_and_qrm_name_the_same_class_and_are_told_apart(folders: dict[str, Path]) -> None:
    armorm, qrm = (read(folders[name])[0] for name in ("armorm", "qrm"))
    assert armorm["architectures"] == qrm["architectures"]
    assert load_family("armorm").matches("any/name", armorm)
    assert not load_family("armorm").matches("any/name", qrm)


def test_a_grm_that_was_finetuned_to_a_classifier_is_a_classifier(tmp_path: Path) -> None:
    folder = save(tiny_reward_model(), tiny_tokenizer(), tmp_path / "GRM-Llama3.2-3B-rewardmodel-ft")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vhead_layer_type": "mlp", "vhead_num_layers": 1}))
    check_reward(RunConfig(pretrained="x").replace(reward_model=str(folder)))
    assert type(make_reward(RunConfig(pretrained="x", reward_model=str(folder)), device="cpu")).__name__ == (
        "SequenceClassifier"
    )


def test_a_language_model_is_a_reward_only_by_its_name(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "my-copy"
    shutil.copytree(folders["nemotron"], copy)
    with pytest.raises(ConfigError, match=r"no reward family reads its architectures \(LlamaForCausalLM\)"):
        loaded(copy, CASES["nemotron"])
    named = loaded(copy, CASES["nemotron"], reward_family="nemotron")
    assert named.score(HELLO, rows("4")) == loaded(folders["nemotron"], CASES["nemotron"]).score(HELLO, rows("4"))


def test_an_unknown_class_is_told_the_nearest_known_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "ArmoRM-Llama3-8B-v0.2"
    shutil.copytree(folders["armorm"], copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["SomethingNew"]}))
    with pytest.raises(ConfigError, match=r"ArmoRM-Llama3-8B-v0.1, which reward_family=armorm reads(.|\n)*Families: "):
        loaded(copy, CASES["armorm"])


# families one by one


@pytest.mark.parametrize("labels", [9, 8])
def test_urm_wants_a_mean_and_a_spread_for_each_attribute(
    labels: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "urm"
    shutil.copytree(folders["urm-fixed"], copy)
    config = json.loads((copy / "config.json").read_text())
    config["id2label"] = {str(i): "x" for i in range(labels)}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"has {labels} labels; URM reads a mean and a spread"):
        loaded(copy, CASES["urm-fixed"])


def test_qrm_scores_do_not_depend_on_the_batch_norms_batch(folders: dict[str, Path]) -> None:
    """In training mode a BatchNorm would; one row alone could not even be scored."""
    reward = loaded(folders["qrm"], CASES["qrm"])
    assert isinstance(reward.head, torch.nn.Module)
    assert not any(module.training for module in reward.head.modules())


def test_internlm2s_fused_matrix_must_fit_the_config(folders: dict[str, Path], tmp_path: Path) -> None:
    key = "model.layers.0.attention.wqkv.weight"
    matrix = read(folders["internlm2_reward"])[1][key]
    folder = changed_weights(folders["internlm2_reward"], tmp_path, {key: matrix[:-8]})
    with pytest.raises(CheckpointError, match=r"wqkv.weight has 56 rows(.|\n)*2 x \(2 \+ 2\) heads of 8"):
        loaded(folder, CASES["internlm2_reward"])


def test_internlm2_reads_its_reward_token_behind_open_turns_too(folders: dict[str, Path]) -> None:
    reward = loaded(folders["internlm2_reward"], CASES["internlm2_reward"], partial_turn="open")
    for finish in ("eos", None):
        (entry,) = reward.renderer.inputs(HELLO, rows("4", finish=finish))
        assert reward.renderer.tokenizer.decode(entry.ids[-1:]) == "[UNUSED_TOKEN_130]"


def test_tied_embeddings_hold_the_language_models_head(tmp_path: Path) -> None:
    from support.reward_checkpoints import score_nemotron

    case = CASES["nemotron"]
    folder = build(case, tmp_path)
    config, tensors = read(folder)
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    ids = ids_of(llama3_tokenizer(), case.text(HELLO, "4"))
    assert loaded(folder, case).score(HELLO, rows("4")) == pytest.approx(
        [score_nemotron(folder, ids)], rel=1e-5, abs=1e-5
    )


def test_a_pickle_is_read_as_tensors_and_never_run(folders: dict[str, Path], tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("code of a checkpoint was run",))

    copy = tmp_path / "Starling-RM-7B-alpha"
    shutil.copytree(folders["starling-7b"], copy)
    torch.save({"transformer.x": Trap()}, copy / "starling_rm.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        loaded(copy, CASES["starling-7b"])


def test_a_template_of_the_users_wins_over_the_familys(folders: dict[str, Path]) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    reward = loaded(folders["ultrarm"], CASES["ultrarm"], reward_template=template)
    (entry,) = reward.renderer.inputs(HELLO, rows("4"))
    assert reward.renderer.tokenizer.decode(entry.ids) == f"<s>user: {QUESTION}\nassistant: 4\n"  # one BOS


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "deberta-v2"])
def test_plain_classifiers_score_as_transformers_own_classes_do(arch: str, tmp_path: Path) -> None:
    """Skywork, FsfairX, RM-Mistral, RM-Gemma, OffsetBias and the encoder of OpenAssistant, at toy size."""
    encoder = arch == "deberta-v2"
    changes: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]} if encoder else {}
    tokenizer = tiny_tokenizer(**({"chat_template": None, "pair": True} if encoder else {}))
    model = tiny_reward_model(arch, **changes)
    folder = save(model, tokenizer, tmp_path / arch)
    expected = []
    for text in TEXTS:
        if encoder:
            encoded = tokenizer(QUESTION, text, return_tensors="pt")
        else:
            turns = [*HELLO, {"role": "assistant", "content": text}]
            encoded = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            expected.append(float(model(**encoded).logits[0, 0]))
    reward = make_reward(RunConfig(pretrained="x", reward_model=str(folder)), device="cpu")
    assert reward.score(HELLO, rows(*TEXTS)) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert max(expected) - min(expected) > 1e-3


@pytest.mark.parametrize("kind", ["classifier", "value head"])
def test_a_softcap_that_old_transformers_leave_out_is_heeded(
    kind: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of bodies that transformers loads with their head, and of bodies that get a head of ours."""
    folder = tmp_path / "gemma2"
    if kind == "classifier":
        save(tiny_reward_model("gemma2", **SOFTCAP), tiny_tokenizer(), folder)
    else:
        config = json.loads((shutil.copytree(folders["grm-linear"], folder) / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **SOFTCAP}))

    def load() -> CheckpointReward:
        reward = make_reward(RunConfig(pretrained="x", reward_model=str(folder)), device="cpu")
        assert isinstance(reward, CheckpointReward)
        return reward

    expected = load().score(HELLO, rows(*TEXTS))
    leave_softcaps_out(monkeypatch)
    reward = load()
    assert reward.score(HELLO, rows(*TEXTS)) == expected
    reward.body.set_attn_implementation("sdpa")
    wrong = reward.score(HELLO, rows(*TEXTS))
    assert max(abs(one - other) for one, other in zip(wrong, expected, strict=True)) > 1e-2


# the listing


def test_every_family_says_what_it_reads_and_names_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewards", "--format", "json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert set(listed["families"]) == set(family_names()) >= {case.family for case in CASES.values()}
    for entry in listed["families"].values():
        assert entry["reads"] and all(example.count("/") == 1 for example in entry["examples"])
    assert {"likelihood", "a+0.5*b"} <= set(listed["other"])


def test_the_listing_in_words_tells_what_is_needed_and_can_be_narrowed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewards", "starling"]) == 0
    text = capsys.readouterr().out
    assert "berkeley-nest/Starling-RM-7B-alpha" in text
    assert "needs: for the 7B model, access to meta-llama/Llama-2-7b-chat-hf" in text
    assert "armorm" not in text and max(map(len, text.splitlines())) <= 120


def test_the_listing_of_an_unknown_family_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewards", "starlin"]) == 1
    assert "Did you mean 'starling'?" in capsys.readouterr().err


def test_no_checkpoint_is_named_by_two_families() -> None:
    names = [example for family in family_names() for example in load_family(family).EXAMPLES]
    assert len(names) == len(set(names))


def test_every_published_example_is_of_a_checkpoint_that_a_family_names() -> None:
    """tests/hub cannot run here; this keeps its names from going stale."""
    known = {example for family in family_names() for example in load_family(family).EXAMPLES}
    assert {example.checkpoint for example in PUBLISHED} <= known
    assert all(len(example.scores) == (1 if example.differences else len(example.answers)) for example in PUBLISHED)


# what each family reads, in words


def rendered(name: str, folder: Path) -> dict[str, str | None]:
    """What is read of four conversations, special tokens written out; None where the template refuses."""
    found: dict[str, str | None] = {}
    for partial in ("closed", "open"):
        reward = loaded(folder, CASES[name], partial_turn=partial)
        conversations = {"one turn": HELLO, "two turns": TWO_TURNS, "system": SYSTEM}
        finish = "eos" if partial == "closed" else None
        for title, conversation in conversations.items():
            found[f"{title}, {partial}"] = _decoded(reward, conversation, rows(STEPS, finish=finish))
    return found


def _decoded(reward: CheckpointReward, conversation: Sequence[dict[str, str]], row: list[RowView]) -> str:
    (entry,) = reward.renderer.inputs(conversation, row)
    text: str = reward.renderer.tokenizer.decode(entry.ids)
    return text


@each_case
def test_templates_are_as_the_golden_file_has_them(name: str, folders: dict[str, Path]) -> None:
    assert rendered(name, folders[name]) == json.loads(TEMPLATES.read_text())[name]


def write_golden() -> None:
    from tempfile import TemporaryDirectory

    found = {}
    for name, case in CASES.items():
        with TemporaryDirectory() as root:
            found[name] = rendered(name, build(case, Path(root)))
    TEMPLATES.parent.mkdir(exist_ok=True)
    TEMPLATES.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write_golden()
