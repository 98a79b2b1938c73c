"""Each layer is compared where its own tokens are valid."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rift_kernels as rk
from tests.support import tiny_models
from tests.support.tiny_models import perturbed


def loss_of(
    student: nn.Module, teacher: nn.Module, batch: Any, layers: Any, **settings: Any
) -> tuple[Tensor, dict[str, str]]:
    """The loss of one batch, and where the masks came from."""
    settings = {"pooling": "tokens", **settings}
    with rk.RIFTRegularizer(student, teacher, layers=layers, **settings) as rift:
        if isinstance(batch, dict):
            student(**batch)
        else:
            student(*batch)
        return rift().detach(), rift.token_masks


def padded(batch: dict[str, Tensor], name: str, count: int) -> dict[str, Tensor]:
    """The batch with masked tokens of rubbish at its end."""
    mask = nn.functional.pad(batch["attention_mask"], (0, count))
    return {
        **batch,
        name: nn.functional.pad(batch[name], (0, count), value=7),
        "attention_mask": mask,
    }


@pytest.mark.parametrize("pooling", ["mean", "tokens", "last"])
def test_frames_of_audio_have_a_mask_of_frames(pooling) -> None:
    """The mask of the call is one of samples."""
    student = tiny_models.wav2vec2()
    teacher, batch = perturbed(student), tiny_models.audio()
    results = [
        loss_of(student, teacher, each, "*encoder.layers.1", pooling=pooling)
        for each in (batch, padded(batch, "input_values", 80))
    ]
    assert results[0][1] == {"wav2vec2.encoder.layers.1": "wav2vec2.encoder.attention_mask"}
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-6)
    unmasked, sources = loss_of(
        student, teacher, batch, "*encoder.layers.1", pooling=pooling, token_mask=None
    )
    assert sources == {"wav2vec2.encoder.layers.1": "none"}
    assert not torch.allclose(results[0][0], unmasked, rtol=1e-3)


def test_images_beside_a_text_have_no_mask() -> None:
    """The text has as many tokens as the image, so that its mask would fit."""
    student = tiny_models.clip()
    teacher, ids = perturbed(student), tiny_models.text(tokens=17)
    batch = {**ids, "pixel_values": tiny_models.images()}
    layers = ["text_model.encoder.layers.1", "vision_model.encoder.layers.1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, sources = loss_of(student, teacher, batch, layers)
    assert sources[layers[0]] == "text_model.attention_mask"
    assert sources[layers[1]].startswith("none (attention_mask is not of the tokens")
    losses = [
        loss_of(student, teacher, batch, layer, token_mask=mask)[0]
        for layer, mask in ((layers[0], "attention_mask"), (layers[1], None))
    ]
    torch.testing.assert_close(loss, sum(losses) / 2)


def test_a_mask_that_does_not_reach_a_layer_warns_once() -> None:
    class Shortened(nn.Module):
        """Merges two tokens into one, and has a mask for that."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6))

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:  # noqa: ARG002
            return self.inner(x.reshape(len(x), -1, 8))

    torch.manual_seed(0)
    student = Shortened()
    teacher = perturbed(student)
    batch = {"x": torch.randn(8, 6, 4), "attention_mask": torch.arange(6).expand(8, 6) < 4}
    layers = ["inner.0", "inner.1"]
    message = "every token of 'inner.0', 'inner.1' is compared, because no mask"
    rift = rk.RIFTRegularizer(student, teacher, layers=layers, pooling="tokens")
    student(**batch)
    with pytest.warns(UserWarning, match=message):
        loss = rift()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student(**batch)
        rift()
        said, _ = loss_of(student, teacher, batch, layers, token_mask={"inner*": None})
        by_pairs = {"*": lambda call: call["attention_mask"][:, ::2]}
        masked, _ = loss_of(student, teacher, batch, layers, token_mask=by_pairs)
    assert torch.equal(loss.detach(), said)
    assert not torch.equal(said, masked)


def test_a_mask_inside_a_positional_mapping() -> None:
    class Pipeline(nn.Sequential):
        """As sentence-transformers has it."""

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            for module in self:
                batch = module(batch)
            return batch

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {**batch, "token_embeddings": self.layer(batch["x"])}

    torch.manual_seed(0)
    student = Pipeline(Transformer())
    teacher = perturbed(student)
    x, mask = torch.randn(8, 7, 4), torch.arange(7) < torch.arange(1, 9)[:, None]
    poisoned = torch.where(mask.unsqueeze(-1), x, float("nan"))
    loss, sources = loss_of(student, teacher, ({"x": poisoned, "attention_mask": mask},), "0.layer")
    assert loss.isfinite()
    assert sources == {"0.layer": "0.attention_mask"}


def test_a_sentence_transformer() -> None:
    reason = "needs sentence-transformers"
    library = pytest.importorskip("sentence_transformers", reason=reason)
    tokenizers = pytest.importorskip("tokenizers", reason=reason)
    import tempfile

    import transformers
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "b", "c"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    with tempfile.TemporaryDirectory() as folder:
        tiny_models.bert().bert.save_pretrained(folder)
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
        ).save_pretrained(folder)
        student = library.SentenceTransformer(modules=[Transformer(folder), Pooling(16)])
    batch = student.preprocess(["a b c", "a", "b c a b a", "c c", "b", "c a"])
    teacher = perturbed(student)
    results = []
    for count in (0, 4):
        more = {
            name: nn.functional.pad(batch[name], (0, count))
            for name in ("input_ids", "attention_mask")
        }
        results.append(loss_of(student, teacher, ({**batch, **more},), "*layer.1", pooling="mean"))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-6)
    assert results[0][1] == {"0.model.encoder.layer.1": "0.attention_mask"}
    assert float(results[0][0]) > 1e-4


@pytest.mark.parametrize("pooling", ["mean", "tokens", "last"])
def test_torchs_own_encoder(pooling) -> None:
    """Its mask is True at padding, and its inference path would leave padded tokens out."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    student = nn.TransformerEncoder(layer, 2)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 6, 16, generator=generator)
    padding = torch.arange(6) >= torch.randint(2, 6, (8, 1), generator=generator)
    for teacher, is_same in ((copy.deepcopy(student), True), (perturbed(student), False)):
        losses = []
        for count in (0, 2):
            batch = {
                "src": nn.functional.pad(x, (0, 0, 0, count), value=7.0),
                "src_key_padding_mask": nn.functional.pad(padding, (0, count), value=True),
            }
            loss, sources = loss_of(student, teacher, batch, "layers.*", pooling=pooling)
            losses.append(loss)
        assert sources == dict.fromkeys(["layers.0", "layers.1"], "~src_key_padding_mask")
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
        assert (abs(float(losses[0])) < 1e-6) == is_same
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_sentence_embedding_is_taken_out_of_a_dictionary() -> None:
    """As of sentence-transformers, whose layers return their batch with more in it."""

    class Embedding(Text):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {**batch, "sentence_embedding": super().forward(batch["x"]).mean(1)}

    student = nn.Sequential(Embedding())
    teacher = perturbed(student)
    batch = {"x": torch.randn(8, 5, 4), "attention_mask": MASK}
    loss, _ = loss_of(student, teacher, (batch,), "0", pooling=lambda x, _: x["sentence_embedding"])
    rows = [model[0](batch)["sentence_embedding"] for model in (student, teacher)]
    torch.testing.assert_close(loss, rk.RIFTLoss()(*rows).detach())
    with pytest.raises(TypeError, match=r"layer '0' must be a tensor.*got dict.*as pooling that"):
        loss_of(student, teacher, (batch,), "0")


def test_the_inference_path_of_a_validation() -> None:
    """The student takes it in eval mode without gradients, and the hooks cannot prevent that."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    student = nn.TransformerEncoder(layer, 2).eval()
    rift = rk.RIFTRegularizer(student, copy.deepcopy(student), layers="layers.0", pooling="mean")
    padding = torch.arange(6).expand(8, 6) > 3
    with torch.no_grad():
        student(torch.randn(8, 6, 16), src_key_padding_mask=padding)
        with pytest.raises(ValueError, match=r"'layers\.0' must not be nested.*set_fastpath_ena"):
            rift()


# --- the user's word


class Text(nn.Module):
    """Tokens through two layers, with a mask that the layers do not see."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, attention_mask: Any = None, valid: Any = None) -> Tensor:  # noqa: ARG002
        return self.second(self.first(x))


MASK = torch.arange(5) < torch.arange(1, 9).clamp(max=5)[:, None]


def text_loss(setting: Any, layers: Any = "second", **keywords: Any) -> float:
    student = Text()
    x = torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(1))
    batch = {"x": x, **keywords}
    return float(loss_of(student, perturbed(student), batch, layers, token_mask=setting)[0])


def test_settings() -> None:
    masked = text_loss(lambda _: MASK)
    assert masked != text_loss(None)
    assert masked == text_loss("auto", attention_mask=MASK.long())
    assert masked == text_loss("valid", valid=MASK)
    assert masked == text_loss("valid", valid=MASK.int(), attention_mask=~MASK)
    assert masked == text_loss(lambda call: call["valid"] == 0, valid=torch.where(MASK, 0.0, -9.0))
    assert masked == text_loss({"sec*": lambda _: MASK})
    assert text_loss(None) == text_loss("valid", valid=None)
    assert text_loss(None) == text_loss(lambda call: call.get("attention_mask"))


def test_settings_by_layer() -> None:
    both = ["first", "second"]
    mixed = text_loss({"first": None}, both, attention_mask=MASK)
    expected = [text_loss(None, "first"), text_loss(lambda _: MASK, "second")]
    assert mixed == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert text_loss({"*": lambda _: MASK}, both) == text_loss(lambda _: MASK, both)


def test_the_call_overrides_the_setting() -> None:
    student = Text()
    rift = rk.RIFTRegularizer(student, perturbed(student), layers="second", pooling="tokens")
    x = torch.randn(8, 5, 4)
    losses = []
    for settings in ({"token_mask": MASK}, {"token_mask": None}, {}):
        student(x, attention_mask=MASK)
        losses.append(float(rift(**settings).detach()))
    assert losses[0] == losses[2] != losses[1]


ERRORS = {
    r"attention_mask must be boolean or integer .* call\['attention_mask'\] == 0 if it is added": (
        TypeError,
        "auto",
        {"attention_mask": torch.where(MASK, 0.0, float("-inf"))},
    ),
    "valid must be boolean or integer": (TypeError, "valid", {"valid": MASK.float()}),
    r"which attention_mask of shape \(8, 1, 5, 5\) does not: got 'auto'. Give a boolean mask": (
        ValueError,
        "auto",
        {"attention_mask": torch.ones(8, 1, 5, 5)},
    ),
    "token_mask must name an argument of the student's call; got 'padding', .*'x', 'valid'": (
        ValueError,
        "padding",
        {"valid": MASK},
    ),
    r"mask must be \(8, 5\) for layer 'second' .* got \(8, 4\)": (
        ValueError,
        lambda _: MASK[:, :4],
        {},
    ),
    "token_mask must not be a tensor here, because it would serve every batch": (
        TypeError,
        MASK,
        {},
    ),
    "token_mask must map names or patterns of the layers 'second'; got 'first'": (
        ValueError,
        {"first": None},
        {},
    ),
    "token_mask must be 'auto', the name of an argument, .*; got int": (TypeError, 3, {}),
    "token_mask must be .* from layers to these; got float": (TypeError, {"second": 0.5}, {}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message) -> None:
    error, setting, keywords = ERRORS[message]
    with pytest.raises(error, match=message):
        text_loss(setting, **keywords)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_an_argument_that_may_be_the_mask_warns_once(dtype) -> None:
    """An integer argument of the mask's shape counts if its name says so."""
    student = Text()
    rift = rk.RIFTRegularizer(
        student, perturbed(student), layers=["first", "second"], pooling="mean"
    )
    batch = {"x": torch.randn(8, 5, 4), "valid": MASK.to(dtype)}
    student(**batch)
    with pytest.warns(UserWarning, match="every token of 'first', 'second' .*but 'valid' in the"):
        rift()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student(**batch)
        rift()
        for setting in ("valid", None):
            loss_of(student, perturbed(student), batch, "first", token_mask=setting)


@pytest.mark.parametrize("setting", [None, MASK])
def test_what_the_call_says_of_masks_is_no_oversight(setting) -> None:
    student = Text()
    rift = rk.RIFTRegularizer(student, perturbed(student), layers="second", pooling="mean")
    student(torch.randn(8, 5, 4), valid=MASK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rift(token_mask=setting)


def test_a_function_that_asks_for_what_is_not_there() -> None:
    with pytest.raises(KeyError, match="padding") as caught:
        text_loss(lambda call: call["padding"])
    assert caught.value.__notes__ == ["token_mask: the arguments are 'x'"]


def test_a_mask_of_the_call_needs_the_call() -> None:
    student = Text()
    rift = rk.RIFTRegularizer(
        student,
        perturbed(student),
        layers="second",
        pooling="tokens",
        token_mask="valid",
        forward=lambda teacher, x, valid: teacher.second(teacher.first(x)),  # noqa: ARG005
    )
    x = torch.randn(8, 5, 4)
    student.second(student.first(x))
    with pytest.raises(RuntimeError, match=r"token_mask='valid' needs .* give them to rift"):
        rift()
    assert rift(x, valid=MASK).isfinite()
    assert rift.token_masks == {"second": "valid"}
