"""Rendering, tokenising, saving and loading of aligner templates."""

import json

import pytest

from cyclealign_trl.aligner.aligner_template import TEMPLATES, AlignerTemplate, make_template, render_question
from tests.conftest import make_tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_template_contains_the_question_and_then_the_answer(name):
    text = make_template(name).render("QUESTION", "ANSWER")
    assert text.index("QUESTION") < text.index("ANSWER")
    assert "{" not in text


def test_labels_template_has_a_heading_for_each_part():
    lines = make_template("labels").render("Why?", "No.").splitlines()
    assert [line for line in lines if line.startswith("##")] == ["## Question", "## Answer", "## Correction"]


@pytest.mark.parametrize("untrusted", ["{question}", "{answer}", "{0}", "{", "}", "{x.__class__}", "\\g<0>", "%s"])
def test_text_is_inserted_literally(untrusted):
    template = AlignerTemplate("<{question}|{answer}>")
    assert template.render(untrusted, "a") == f"<{untrusted}|a>"
    assert template.render("q", untrusted) == f"<q|{untrusted}>"
    assert template.render("{answer}", "{question}") == "<{answer}|{question}>"


@pytest.mark.parametrize("text", ["{question}", "{answer}", "labelz", "{question}{answer}{answer}"])
def test_a_missing_or_repeated_placeholder_raises(text):
    with pytest.raises(ValueError, match=r"exactly once, but .* times.*'labels', 'instruction', 'conversation'"):
        make_template(text)


def test_renders_the_question_of_a_conversation():
    user, assistant, system = ({"role": role, "content": f" {role}? "} for role in ("user", "assistant", "system"))
    assert render_question("\n\nHuman: Hi\n\nAssistant:") == "Human: Hi\n\nAssistant:"
    assert render_question([user]) == "user?"
    assert render_question([system, user]) == "System: system?\n\nUser: user?"
    assert render_question([user, assistant, user]) == "User: user?\n\nAssistant: assistant?\n\nUser: user?"


def test_a_long_text_loses_the_beginning_of_its_question():
    template, tokenizer = AlignerTemplate("Q:{question} A:{answer}="), make_tokenizer()

    def encode(max_length):
        ids = template.encode(tokenizer, "abcdef", "xyz", max_length)
        return ids and tokenizer.decode(ids)

    assert encode(None) == encode(15) == "Q:abcdef A:xyz="
    assert encode(12) == "Q:def A:xyz="
    assert encode(9) == "Q: A:xyz="
    assert encode(8) is None


def test_truncation_ends_even_if_decoding_adds_tokens():
    class Doubling:
        """Tokenizer that decodes each token to two."""

        def __call__(self, text, **_):
            return {"input_ids": list(text)}

        def decode(self, ids):
            return "".join(ids) * 2

    template = AlignerTemplate("{question}{answer}")
    assert template.encode(Doubling(), "abcdef", "xyz", 7) == list("xyz")
    assert template.encode(Doubling(), "abcdef", "xyz", 2) is None


def test_saves_and_loads_a_template(tmp_path):
    template = AlignerTemplate("„{question}“ {answer}\n")
    template.save(tmp_path)
    assert json.loads((tmp_path / "aligner_template.json").read_text(encoding="utf-8")) == {"text": template.text}
    assert AlignerTemplate.load(tmp_path) == template
    (tmp_path / "other").mkdir()
    assert AlignerTemplate.load(tmp_path / "other") is None
