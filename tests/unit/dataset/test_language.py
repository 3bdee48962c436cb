"""dataset/language.py"""

import pytest

from mlx_qlora.dataset.language import LANGUAGES, LanguageCount, guess_language

SAMPLES = {
    "pt": "Quem foi o treinador do clube quando ele venceu? Não há uma resposta certa.",
    "en": "Who was the coach of the club when they won, and what is the right answer?",
    "es": "¿Quién fue el entrenador del club y cuándo ganó? Los aficionados están muy contentos.",
    "fr": "Qui était le président des clubs, et pourquoi est-il parti avec les joueurs ?",
    "de": "Wer war der Trainer, und warum ist er nicht mit den Spielern gefahren?",
    "it": "Chi era il presidente della squadra, e perché gli altri non sono anche qui?",
}


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_sentence_is_known_by_its_small_words(code):
    guess = guess_language(SAMPLES[code])
    assert (guess.code, guess.name) == (code, LANGUAGES[code])
    assert guess.certainty >= 0.6


def test_a_single_word_is_never_more_than_half_certain():
    assert guess_language("você").certainty == 0.5


@pytest.mark.parametrize("text", ["", "1926", "Valbruma 3 x 1", "日本語の文です", "de que como este"])
def test_what_speaks_for_no_language_is_not_guessed_at(text):
    assert guess_language(text) is None


def test_a_text_in_two_languages_is_less_certain():
    assert guess_language(SAMPLES["pt"] + SAMPLES["en"]).certainty < guess_language(SAMPLES["pt"]).certainty


def test_accents_written_as_characters_of_their_own_count_the_same():
    import unicodedata

    assert guess_language(unicodedata.normalize("NFD", SAMPLES["pt"])) == guess_language(SAMPLES["pt"])


def test_each_text_has_one_vote():
    count = LanguageCount()
    for text in [SAMPLES["pt"]] * 7 + [SAMPLES["en"]] * 3 + ["1926"]:
        count.add(text)
    guess = count.guess()
    assert (guess.code, guess.words) == ("pt", 10)
    assert guess.certainty == pytest.approx(7 / 11)


def test_the_words_of_a_frame_count_only_around_questions():
    assert guess_language("Pergunta: Resposta:") is None
    assert guess_language("Pergunta: Resposta:", is_frame=True).code == "pt"
    assert guess_language("Question: Answer:", is_frame=True).code == "en"


def test_real_data_sets_are_told_apart(material):
    import json

    told = {}
    for name in ("faquad/faquad_qa", "gsm8k/test"):
        count = LanguageCount()
        for line in (material / "datasets" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            count.add(json.loads(line)["question"])
        told[name] = count.guess().code
    assert told == {"faquad/faquad_qa": "pt", "gsm8k/test": "en"}
