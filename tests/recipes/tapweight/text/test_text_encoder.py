"""Encoders of transformers: pooling, heads for masked tokens, lengths, saving, and refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceTrainer
from text_cases import KINDS, VOCABULARY, corpus, encoder, model, save, tokenizer
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForSequenceClassification,
    DistilBertConfig,
    ElectraConfig,
    MPNetConfig,
    SplinterConfig,
    SplinterForPreTraining,
    XLNetConfig,
)

from mlopt.recipes.tapweight.text.encoder import ModelError, TextEncoder
from mlopt.recipes.tapweight.text.heads import LinearHead, TiedHead

SIZE: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def batch_of(own: TextEncoder, *texts: str) -> dict[str, torch.Tensor]:
    return own.collate([{"text": text} for text in texts])


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_change_the_representation_of_a_text(kind: str) -> None:
    """A text has the same representation alone and beside a longer one."""
    own = encoder(kind).eval()
    text, longer = "the thing1 is good", "the thing2 is not bad and the thing3 is fine and great"
    with torch.no_grad():
        alone = own.pool(batch_of(own, text))[0]
        beside = own.pool(batch_of(own, longer, text))[1]
    torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-6)


def test_pooling_is_the_mean_over_tokens_or_the_first_one() -> None:
    first, mean = (
        TextEncoder(model(), tokenizer(), pooling=pooling, max_length=16).eval() for pooling in ("cls", "mean")
    )
    batch = batch_of(mean, "the thing1 is good", "good")
    with torch.no_grad():
        hidden = mean.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        torch.testing.assert_close(first.pool(batch), hidden[:, 0])
        torch.testing.assert_close(mean.pool(batch)[0], hidden[0].mean(0))
        torch.testing.assert_close(mean.pool(batch)[1], hidden[1, :3].mean(0))
        torch.testing.assert_close(mean(batch), hidden)
    assert mean.width == hidden.shape[2]


@pytest.mark.parametrize("kind", [*KINDS, "deberta-v2, new"])
def test_the_checkpoints_own_head_gives_its_own_logits(kind: str) -> None:
    more = {"legacy": False} if kind.endswith("new") else {}
    whole = model(kind.split(",")[0], masked=True, **more).eval()
    own = TextEncoder(copy.deepcopy(whole), tokenizer(), max_length=16).eval()
    assert own.has_masked_token_head
    batch = batch_of(own, "the thing1 is good and bad", "not")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    head = own.masked_token_head().eval()
    with torch.no_grad():
        logits = head(own(batch).flatten(0, 1)).view(2, -1, len(VOCABULARY))
        torch.testing.assert_close(logits, whole(**inputs).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_output_layer_of_a_head_is_the_embeddings_of_its_encoder(kind: str, masked: bool) -> None:
    own = copy.deepcopy(encoder(kind, masked=masked))
    heads = [own.masked_token_head() for _ in range(2)]
    tied = {id(p) for p in own.parameters()}
    for head in heads:
        shared = [p for p in head.parameters() if id(p) in tied]
        assert any(p is own.embeddings.weight for p in shared)
        assert not masked or head.model.get_output_embeddings().weight is own.embeddings.weight
        assert len(shared) == 1
        assert len(list(head.parameters())) > 1
    own_parts = [{id(p) for p in head.parameters()} - tied for head in heads]
    assert not own_parts[0] & own_parts[1]
    assert isinstance(heads[0], TiedHead) is not masked


def test_a_head_is_not_part_of_the_encoder() -> None:
    plain, masked = encoder(), encoder(masked=True)
    assert [n for n, _ in plain.named_parameters() if "pooler" not in n] == [n for n, _ in masked.named_parameters()]


def test_a_copy_has_parameters_of_its_own_and_the_same_tokenizer() -> None:
    own = encoder()
    twin = copy.deepcopy(own)
    assert twin.tokenizer is own.tokenizer
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in own.parameters()}
    batch = batch_of(own, "good")
    torch.testing.assert_close(twin.eval().pool(batch), own.eval().pool(batch), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_saved_encoder_is_read_by_transformers_and_by_us(kind: str, masked: bool, tmp_path: Path) -> None:
    own = encoder(kind, masked=masked).eval()
    own.save(tmp_path)
    batch = batch_of(own, "the thing1 is good", "bad")
    plain = AutoModel.from_pretrained(tmp_path).eval()
    for name, value in own.model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value)
    inputs = AutoTokenizer.from_pretrained(tmp_path)(["the thing1 is good", "bad"], padding=True, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], batch["input_ids"])
    again = TextEncoder.load(tmp_path, max_length=16).eval()
    with torch.no_grad():
        expected = own(batch)
        torch.testing.assert_close(again(batch), expected, rtol=0, atol=0)
        hidden = plain(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        torch.testing.assert_close(hidden, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_with_a_head_is_loaded_with_it(kind: str, tmp_path: Path) -> None:
    whole = model(kind, masked=True)
    with torch.no_grad():
        for parameter in whole.parameters():  # away from any initialisation
            parameter.add_(0.1 * torch.randn_like(parameter))
    save(tmp_path, whole)
    own = TextEncoder.load(tmp_path, max_length=16).eval()
    assert own.has_masked_token_head
    batch = batch_of(own, "the thing1 is good")
    head = own.masked_token_head().eval()
    assert head.model.get_output_embeddings().weight is own.embeddings.weight
    read = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = read(batch["input_ids"], batch["attention_mask"]).logits[0]
        torch.testing.assert_close(head(own(batch)[0]), expected, rtol=1e-5, atol=1e-6)


def test_a_head_that_a_checkpoint_claims_but_lacks_is_a_new_one(tmp_path: Path) -> None:
    save(tmp_path, model())
    config = (tmp_path / "config.json").read_text()
    assert "BertModel" in config
    (tmp_path / "config.json").write_text(config.replace("BertModel", "BertForMaskedLM"))
    own = TextEncoder.load(tmp_path)
    assert not own.has_masked_token_head
    assert isinstance(own.masked_token_head(), TiedHead)


def test_a_checkpoint_that_lacks_weights_of_the_encoder_is_refused(tmp_path: Path) -> None:
    own = model()
    state = {key: value for key, value in own.state_dict().items() if not key.startswith("encoder.layer.1.output")}
    own.save_pretrained(tmp_path, state_dict=state)
    tokenizer().save_pretrained(tmp_path)
    sentence = (
        "lacks 4 weights of the encoder, the first 'encoder.layer.1.output.LayerNorm.bias'; give a whole checkpoint"
    )
    with pytest.raises(ModelError, match=sentence):
        TextEncoder.load(tmp_path)
    assert TextEncoder.load(tmp_path, num_hidden_layers=1).model.config.num_hidden_layers == 1
    with pytest.raises(
        ModelError, match=r"has the shape \(35, 16\) for 'embeddings.word_embeddings.weight', where its .* \(40, 16\)"
    ):
        TextEncoder.load(tmp_path, num_hidden_layers=1, vocab_size=40)


@pytest.mark.parametrize(
    "config",
    [
        AlbertConfig(embedding_size=8, **SIZE),
        DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=len(VOCABULARY)),
        ElectraConfig(embedding_size=8, **SIZE),
        MPNetConfig(**SIZE),
    ],
    ids=lambda config: config.model_type,
)
def test_a_checkpoint_without_a_pooler_is_loaded(config: Any, tmp_path: Path) -> None:
    save(tmp_path, AutoModelForMaskedLM.from_config(config))
    assert TextEncoder.load(tmp_path).has_masked_token_head


def test_an_encoder_without_a_head_for_masked_tokens_in_transformers_gets_a_new_one(tmp_path: Path) -> None:
    config = SplinterConfig(question_token_id=4, **SIZE)
    save(tmp_path, SplinterForPreTraining(config))
    own = TextEncoder.load(tmp_path)
    assert isinstance(own.masked_token_head(), TiedHead)


def test_the_encoder_of_a_model_with_another_head_is_used() -> None:
    whole = BertForSequenceClassification(model().config)
    own = TextEncoder(whole, tokenizer())
    assert own.model is whole.bert
    assert not own.has_masked_token_head


@pytest.mark.parametrize(("kind", "most"), [("bert", 32), ("roberta", 31), ("deberta-v2", 32), ("modernbert", 32)])
def test_the_length_is_the_limit_of_the_model(kind: str, most: int) -> None:
    """RoBERTa's positions start after that of the padding."""
    own = TextEncoder(model(kind), tokenizer())
    assert own.max_length == most
    batch = batch_of(own, " ".join(["good"] * 50))
    assert batch["input_ids"].shape == (1, most)
    assert own(batch).shape == (1, most, own.width)
    assert batch["input_ids"][0, -1] == own.tokenizer.sep_token_id


def test_a_model_without_a_limit_needs_one() -> None:
    """XLNet's relative positions do not have a limit: its configuration has -1."""
    own = AutoModel.from_config(XLNetConfig(vocab_size=len(VOCABULARY), d_model=16, n_layer=1, n_head=2, d_inner=16))
    assert TextEncoder(own, tokenizer(model_max_length=24)).max_length == 24
    assert TextEncoder(own, tokenizer(), max_length=1_000).max_length == 1_000
    with pytest.raises(
        ModelError, match="max_length=None, but neither the model nor its tokenizer has a limit; give one"
    ):
        TextEncoder(own, tokenizer())
    with pytest.raises(ModelError, match="max_length=2; the model takes 3 or more tokens"):
        TextEncoder(own, tokenizer(), max_length=2)


def test_the_first_token_of_a_text_is_not_its_padding() -> None:
    left = tokenizer(padding_side="left")
    with pytest.raises(ModelError, match=r"'cls' takes the first token, which is padding if .* give pooling='mean'"):
        TextEncoder(model(), left, pooling="cls")
    own = TextEncoder(model(), left).eval()
    batch = batch_of(own, "good", "the thing1 is bad")
    assert batch["input_ids"][0, 0] == left.pad_token_id
    torch.testing.assert_close(own.pool(batch)[0], own(batch)[0, 3:].mean(0))


def test_a_tokenizer_is_saved_without_the_lengths_of_its_last_batch(tmp_path: Path) -> None:
    own = encoder()
    batch_of(own, "good", "the thing1 is bad")
    before = own.tokenizer.backend_tokenizer.to_str()
    assert json.loads(before)["truncation"]["max_length"] == 16
    own.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["truncation"] is saved["padding"] is None
    assert own.tokenizer.backend_tokenizer.to_str() == before


def test_truncated_texts_are_counted_and_reported() -> None:
    collate = encoder().collate
    examples = [{"text": " ".join(["good"] * count)} for count in (13, 14, 15, 16)]
    assert collate.cut(examples) == 2
    assert collate.remark(examples, "x.txt") == ["2 of 4 texts of x.txt are longer than 16 tokens and are cut off"]
    assert collate.remark(examples[:2], "x.txt") == []
    assert collate.cut([{"text": "good", "text_b": " ".join(["bad"] * 13)}, {"text": "good", "text_b": "bad"}]) == 1


@pytest.mark.parametrize(("kind", "distinguishes"), [("bert", True), ("roberta", False)])
def test_token_types_are_used_if_the_model_distinguishes_them(kind: str, distinguishes: bool) -> None:
    own = TextEncoder(
        model(kind), tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    ).eval()
    batch = own.collate([{"text": "good", "text_b": "bad"}])
    assert batch["input_ids"].tolist() == [[2, 25, 3, 28, 3]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]
    swapped = {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}
    assert torch.equal(own(batch), own(swapped)) is not distinguishes


def test_a_batch_holds_the_entries_of_its_examples() -> None:
    batch = encoder().collate([{"text": "good", "a": 1, "b": 0.5, "c": torch.ones(2)} for _ in range(3)])
    assert batch["a"].dtype == torch.int64
    assert batch["b"].dtype == torch.float32
    assert batch["c"].shape == (3, 2)


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2"])
def test_outputs_of_half_precision_weights_are_float32(kind: str) -> None:
    own = TextEncoder(model(kind, masked=True).bfloat16(), tokenizer(), max_length=16)
    batch = batch_of(own, "good", "the bad")
    assert own.pool(batch).dtype == own(batch).dtype == torch.float32
    assert own.masked_token_head()(own(batch)[0]).dtype == torch.float32
    assert TiedHead(own.width, own.embeddings)(own(batch)[0]).dtype == torch.float32


def test_dropout_is_detected() -> None:
    assert encoder().has_dropout
    assert not encoder(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).has_dropout


def larger(words: int) -> list[str]:
    return [*VOCABULARY, *(f"extra{k}" for k in range(words))]


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (
            lambda: TextEncoder(model(), tokenizer(larger(3))),
            f"the tokenizer has {len(VOCABULARY) + 3} tokens, but the model embeds {len(VOCABULARY)}; give the tokenizer of this",
        ),
        (lambda: TextEncoder(model(), tokenizer(pad_token=None)), "no padding token, which batches need"),
        (lambda: TextEncoder(model(), tokenizer(), max_length=33), "max_length=33; the model takes from 3 to 32"),
        (lambda: TextEncoder(model(), tokenizer(), max_length=2), "max_length=2; the model takes from 3 to 32"),
        (lambda: TextEncoder(model(), tokenizer(), pooling="max"), "pooling='max'; give 'mean' or 'cls'"),
        (lambda: TextEncoder.load("nobody/no-such-model"), "model='nobody/no-such-model' cannot be loaded ("),
        (lambda: TextEncoder.load(__file__), "is a file; give the folder that holds it"),
        (lambda: TextEncoder.load(Path(__file__).parent), "cannot be loaded ("),
    ],
)
def test_a_model_that_does_not_fit_is_refused_in_a_sentence(act, sentence: str) -> None:
    with pytest.raises(ModelError) as error:
        act()
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_decoder_is_refused() -> None:
    own = model()
    own.config.is_encoder_decoder = True
    with pytest.raises(ModelError, match="BertModel has a decoder; give an encoder"):
        TextEncoder(own, tokenizer())


def test_layers_are_dropped_when_a_model_is_loaded(tmp_path: Path) -> None:
    own = encoder()
    own.save(tmp_path)
    cut = TextEncoder.load(tmp_path, num_hidden_layers=1)
    assert len(cut.model.encoder.layer) == 1
    for name, value in cut.model.encoder.layer[0].state_dict().items():
        assert torch.equal(value, own.model.encoder.layer[0].state_dict()[name])


def test_a_tokenizer_that_is_a_model_of_sentencepiece_is_read(tmp_path: Path) -> None:
    """DeBERTa-v3 has such a tokenizer."""
    (tmp_path / "corpus.txt").write_text("\n".join(text["text"] for text in corpus(50)))
    SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "spm"), vocab_size=48, hard_vocab_limit=False,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]",
        minloglevel=2,
    )  # fmt: skip
    model("deberta-v2", vocab_size=64).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "DebertaV2Tokenizer", "vocab_type": "spm"}')
    own = TextEncoder.load(tmp_path).eval()
    batch = batch_of(own, "the thing1 is good")
    assert own.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True).strip() == "the thing1 is good"
    assert own.tokenizer.mask_token_id is not None
    assert own.pool(batch).isfinite().all()


def test_a_model_without_the_files_of_its_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers makes a tokenizer of special tokens, for which all words are unknown."""
    encoder().save(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(
        ModelError, match="the tokenizer has special tokens only, so all texts would be alike; save the"
    ):
        TextEncoder.load(tmp_path)


def test_a_model_whose_tensors_are_cut_off_is_refused(tmp_path: Path) -> None:
    encoder().save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:50])
    with pytest.raises(ModelError, match=r"cannot be loaded \(.*header"):
        TextEncoder.load(tmp_path)


def test_the_code_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    own = encoder()
    own.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    theirs = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.C", "AutoModel": "theirs.M"}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **theirs}))
    (tmp_path / "theirs.py").write_text("raise SystemExit('their code ran')\n")
    with pytest.raises(ModelError, match="cannot be loaded"):
        TextEncoder.load(tmp_path)


def test_collating_does_not_change_the_corpus() -> None:
    texts = corpus(3)
    before = copy.deepcopy(list(texts))
    encoder().collate([texts[0], texts[1]])
    assert list(texts) == before
    assert isinstance(encoder().embeddings, nn.Embedding)


def test_adam_moves_the_outputs_of_a_linear_head_by_its_factor() -> None:
    """The head starts like a linear layer; one step of Adam moves its outputs f times as far."""
    features = torch.randn(8, 5)
    moved = {}
    for factor in (1.0, 20.0):
        torch.manual_seed(0)
        head = LinearHead(5, 3, factor)
        start = head(features).detach()
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-4)
        head(features).square().mean().backward()
        optimizer.step()
        moved[factor] = (start, head(features).detach() - start)
    torch.testing.assert_close(moved[1.0][0], moved[20.0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(20 * moved[1.0][1], moved[20.0][1], rtol=1e-2, atol=1e-5)
