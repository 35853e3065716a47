"""The 25 kinds of IFEval (Zhou et al. 2023, arXiv 2311.07911): same ids, same arguments, same meaning.

In: an answer and the arguments of an instruction. Out: whether the answer follows it. Told otherwise than by the
published checkers, which need NLTK's and langdetect's models and draw what they lack by chance:
    where a sentence ends   `text.sentences`: Chinese has sentences too, and the number of a list's item is none
    languages               `language.is_in`: by script and small words
    keywords                are texts, not regular expressions; a Chinese one is found wherever it stands
    a letter                may be any character, such as #; an argument that is missing is an error
"""

import collections
import json
import re

from jax_sft.evaluate.rules.arguments import (
    Kind,
    character,
    compare,
    count,
    language,
    published_relation,
    text,
    texts,
)
from jax_sft.evaluate.rules.language import is_in
from jax_sft.evaluate.rules.text import capital_words, count_words, sentences, word_pattern

_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}


def _existence(answer: str, *, keywords: tuple[str, ...]) -> bool:
    return all(re.search(re.escape(keyword), answer, re.IGNORECASE) for keyword in keywords)


def _frequency(answer: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return compare(len(re.findall(re.escape(keyword.strip()), answer, re.IGNORECASE)), relation, frequency)


def _forbidden_words(answer: str, *, forbidden_words: tuple[str, ...]) -> bool:
    return not any(word_pattern(word).search(answer) for word in forbidden_words)


def _letter_frequency(answer: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    return compare(collections.Counter(answer.lower())[letter.lower()], let_relation, let_frequency)


def _number_sentences(answer: str, *, num_sentences: int, relation: str) -> bool:
    return compare(len(sentences(answer)), relation, num_sentences)


def _number_words(answer: str, *, num_words: int, relation: str) -> bool:
    return compare(count_words(answer), relation, num_words)


def _number_paragraphs(answer: str, *, num_paragraphs: int) -> bool:
    """Paragraphs apart by ***; an empty one may stand at the start and at the end alone."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", answer)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def _nth_paragraph_first_word(answer: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs apart by a blank line; the word ends where punctuation begins."""
    parts = answer.split("\n\n")
    number = sum(bool(part.strip()) for part in parts)
    if not 1 <= nth_paragraph <= number or not parts[nth_paragraph - 1].strip():
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return number == num_paragraphs and re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def _number_placeholders(answer: str, *, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", answer)) >= num_placeholders


def _postscript(answer: str, *, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    return re.search(_POSTSCRIPTS.get(marker, re.escape(marker.lower())), answer.lower()) is not None


def _number_bullet_lists(answer: str, *, num_bullets: int) -> bool:
    """Lines that begin with one asterisk or with a dash, as many as asked."""
    stars = re.findall(r"^\s*\*[^\*].*$", answer, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", answer, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def _constrained_response(answer: str) -> bool:
    return any(option in answer for option in _CONSTRAINED)


def _number_highlighted_sections(answer: str, *, num_highlights: int) -> bool:
    """Both *this* and **this**, not empty; the second is found by the second pattern alone."""
    single = [found.strip("*") for found in re.findall(r"\*[^\n\*]*\*", answer)]
    double = re.findall(r"\*\*([^\n\*]*)\*\*", answer)
    return sum(bool(found.strip()) for found in single + double) >= num_highlights


def _multiple_sections(answer: str, *, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", answer)) >= num_sections


def _json_format(answer: str) -> bool:
    """All of it, or what is in its code fence."""
    bare = answer.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        bare = bare.removeprefix(fence)
    try:
        json.loads(bare.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def _title(answer: str) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", answer))


def _two_responses(answer: str) -> bool:
    """Apart by ******, and different; empty ones may stand at the start and at the end alone."""
    parts = [part.strip() for part in answer.split("******")]
    said = [part for part in parts if part]
    return all(parts[1:-1]) and len(said) == 2 and said[0] != said[1]


def _repeat_prompt(answer: str, *, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end_checker(answer: str, *, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(answer: str) -> bool:
    bare = answer.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


def _english_capital(answer: str) -> bool:
    return answer.isupper() and is_in(answer, "en")


def _english_lowercase(answer: str) -> bool:
    return answer.islower() and is_in(answer, "en")


def _capital_word_frequency(answer: str, *, capital_frequency: int, capital_relation: str) -> bool:
    return compare(len(capital_words(answer)), capital_relation, capital_frequency)


PUBLISHED = {
    "keywords:existence": Kind(_existence, {"keywords": texts}),
    "keywords:frequency": Kind(_frequency, {"keyword": text, "frequency": count, "relation": published_relation}),
    "keywords:forbidden_words": Kind(_forbidden_words, {"forbidden_words": texts}),
    "keywords:letter_frequency": Kind(
        _letter_frequency, {"letter": character, "let_frequency": count, "let_relation": published_relation}
    ),
    "language:response_language": Kind(is_in, {"language": language}),
    "length_constraints:number_sentences": Kind(
        _number_sentences, {"num_sentences": count, "relation": published_relation}
    ),
    "length_constraints:number_paragraphs": Kind(_number_paragraphs, {"num_paragraphs": count}),
    "length_constraints:number_words": Kind(_number_words, {"num_words": count, "relation": published_relation}),
    "length_constraints:nth_paragraph_first_word": Kind(
        _nth_paragraph_first_word, {"num_paragraphs": count, "nth_paragraph": count, "first_word": text}
    ),
    "detectable_content:number_placeholders": Kind(_number_placeholders, {"num_placeholders": count}),
    "detectable_content:postscript": Kind(_postscript, {"postscript_marker": text}),
    "detectable_format:number_bullet_lists": Kind(_number_bullet_lists, {"num_bullets": count}),
    "detectable_format:constrained_response": Kind(_constrained_response),
    "detectable_format:number_highlighted_sections": Kind(_number_highlighted_sections, {"num_highlights": count}),
    "detectable_format:multiple_sections": Kind(_multiple_sections, {"section_spliter": text, "num_sections": count}),
    "detectable_format:json_format": Kind(_json_format),
    "detectable_format:title": Kind(_title),
    "combination:two_responses": Kind(_two_responses),
    "combination:repeat_prompt": Kind(_repeat_prompt, {"prompt_to_repeat": text}),
    "startend:end_checker": Kind(_end_checker, {"end_phrase": text}),
    "startend:quotation": Kind(_quotation),
    "change_case:capital_word_frequency": Kind(
        _capital_word_frequency, {"capital_frequency": count, "capital_relation": published_relation}
    ),
    "change_case:english_capital": Kind(_english_capital),
    "change_case:english_lowercase": Kind(_english_lowercase),
    "punctuation:no_comma": Kind(lambda answer: "," not in answer),
}
