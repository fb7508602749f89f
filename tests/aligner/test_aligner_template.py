"""Templates: literal texts, the question of a conversation, what is cut, what is saved."""

import json

import pytest

from cyclealign_trl.aligner.aligner_template import TEMPLATES, AlignerTemplate, make_template, render_question
from tests.conftest import make_tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_variant_holds_question_and_answer_in_this_order(name):
    text = make_template(name).render("QUESTION", "ANSWER")
    assert text.index("QUESTION") < text.index("ANSWER")
    assert "{" not in text


def test_the_default_is_the_one_with_labels():
    lines = make_template("labels").render("Why?", "No.").splitlines()
    assert [line for line in lines if line.startswith("##")] == ["## Question", "## Answer", "## Correction"]


@pytest.mark.parametrize("untrusted", ["{question}", "{answer}", "{0}", "{", "}", "{x.__class__}", "\\g<0>", "%s"])
def test_untrusted_text_stays_literal(untrusted):
    template = AlignerTemplate("<{question}|{answer}>")
    assert template.render(untrusted, "a") == f"<{untrusted}|a>"
    assert template.render("q", untrusted) == f"<q|{untrusted}>"
    assert template.render("{answer}", "{question}") == "<{answer}|{question}>"


@pytest.mark.parametrize("text", ["{question}", "{answer}", "labelz", "{question}{answer}{answer}"])
def test_a_template_has_both_placeholders_once(text):
    with pytest.raises(ValueError, match=r"exactly once; .* times.*'labels', 'instruction', 'conversation'"):
        make_template(text)


def test_the_question_of_a_conversation():
    user, assistant, system = ({"role": role, "content": f" {role}? "} for role in ("user", "assistant", "system"))
    assert render_question("\n\nHuman: Hi\n\nAssistant:") == "Human: Hi\n\nAssistant:"
    assert render_question([user]) == "user?"
    assert render_question([system, user]) == "System: system?\n\nUser: user?"
    assert render_question([user, assistant, user]) == "User: user?\n\nAssistant: assistant?\n\nUser: user?"


def test_a_text_that_is_too_long_loses_the_beginning_of_its_question():
    template, tokenizer = AlignerTemplate("Q:{question} A:{answer}="), make_tokenizer()

    def encode(max_length):
        ids = template.encode(tokenizer, "abcdef", "xyz", max_length)
        return ids and tokenizer.decode(ids)

    assert encode(None) == encode(15) == "Q:abcdef A:xyz="
    assert encode(12) == "Q:def A:xyz="
    assert encode(9) == "Q: A:xyz="
    assert encode(8) is None


def test_cutting_ends_where_a_cut_text_has_more_tokens_than_were_left_of_it():
    class Doubling:
        """Decodes each token to two."""

        def __call__(self, text, **_):
            return {"input_ids": list(text)}

        def decode(self, ids):
            return "".join(ids) * 2

    template = AlignerTemplate("{question}{answer}")
    assert template.encode(Doubling(), "abcdef", "xyz", 7) == list("xyz")
    assert template.encode(Doubling(), "abcdef", "xyz", 2) is None


def test_it_is_saved_as_json_and_read_back(tmp_path):
    template = AlignerTemplate("„{question}“ {answer}\n")
    template.save(tmp_path)
    assert json.loads((tmp_path / "aligner_template.json").read_text(encoding="utf-8")) == {"text": template.text}
    assert AlignerTemplate.load(tmp_path) == template
    (tmp_path / "other").mkdir()
    assert AlignerTemplate.load(tmp_path / "other") is None
