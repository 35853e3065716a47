"""Kinds of our own, in the manner of IFBench (arXiv 2507.02833), with those that Chinese asks for.

In: an answer and the arguments of an instruction. Out: whether the answer follows it. Words are counted as a reader
does: a Chinese character is one, and so is a word between spaces.
"""

import itertools
import json
import re

from jax_sft.evaluate.rules.arguments import Kind, character, compare, count, relation, text, texts
from jax_sft.evaluate.rules.text import EMOJI, HAN, NUMBER, lines, paragraphs, sentences, word_pattern, words

_ITEM = re.compile(r"^[ \t]*(\d+)[.)、．][ \t]*\S", re.MULTILINE)
_HEADING = re.compile(r"^#{1,6}[ \t]+\S", re.MULTILINE)
_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_RULER = re.compile(r"\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?")


def _number_characters(answer: str, *, num_characters: int, relation: str) -> bool:
    """Everything but space counts."""
    return compare(len("".join(answer.split())), relation, num_characters)


def _chinese_characters(answer: str, *, num_characters: int, relation: str) -> bool:
    return compare(len(HAN.findall(answer)), relation, num_characters)


def _characters_in_line(answer: str, *, num_characters: int) -> bool:
    """Each line has exactly so many Chinese characters, as in a classical poem; marks do not count."""
    return all(len(HAN.findall(line)) == num_characters for line in lines(answer))


def _number_lines(answer: str, *, num_lines: int, relation: str) -> bool:
    return compare(len(lines(answer)), relation, num_lines)


def _blank_line_paragraphs(answer: str, *, num_paragraphs: int, relation: str) -> bool:
    return compare(len(paragraphs(answer)), relation, num_paragraphs)


def _sentence_words(answer: str, *, max_words: int) -> bool:
    """A line ends a sentence as well: items of lists often have no full stop."""
    return all(len(words(sentence)) <= max_words for line in lines(answer) for sentence in sentences(line))


def _word_range(answer: str, *, min_words: int, max_words: int) -> bool:
    return min_words <= len(words(answer)) <= max_words


def _numbered_list(answer: str, *, num_items: int) -> bool:
    """Lines that begin with 1., 2., ... (also 1) and 1、), each number once and in order."""
    return [int(number) for number in _ITEM.findall(answer)] == list(range(1, num_items + 1))


def _table(answer: str, *, num_rows: int) -> bool:
    """One table in Markdown; rows are those below the ruler, each as wide as the head."""
    rows = lines(answer)
    rulers = [i for i, line in enumerate(rows) if "|" in line and "-" in line and _RULER.fullmatch(line)]
    if len(rulers) != 1 or rulers[0] == 0:
        return False
    start = rulers[0]
    body = list(itertools.takewhile(lambda line: "|" in line, rows[start + 1 :]))
    return len(body) == num_rows and len({_cells(row) for row in [rows[start - 1], rows[start], *body]}) == 1


def _cells(row: str) -> int:
    return row.removeprefix("|").removesuffix("|").replace(r"\|", "").count("|") + 1


def _code_block(answer: str, *, code_language: str) -> bool:
    """Exactly one fenced block, marked with the language, and not empty."""
    blocks = _FENCE.findall(answer)
    return len(blocks) == 1 and blocks[0][0].strip().lower() == code_language.lower() and bool(blocks[0][1].strip())


def _headings(answer: str, *, num_headings: int) -> bool:
    return len(_HEADING.findall(answer)) == num_headings


def _json_keys(answer: str, *, keys: tuple[str, ...]) -> bool:
    """One JSON object, fenced or not, with these keys at its top and no others."""
    bare = answer.strip()
    if fenced := re.fullmatch(r"```(?:json)?\n(.*)```", bare, re.DOTALL | re.IGNORECASE):
        bare = fenced[1]
    try:
        value = json.loads(bare)
    except ValueError:
        return False
    return isinstance(value, dict) and set(value) == set(keys)


def _one_of(answer: str, *, options: tuple[str, ...]) -> bool:
    """Nothing but one of them; a full stop behind it is forgiven."""
    return answer.strip() in options or answer.strip().rstrip(".。") in options


def _comma_list(answer: str, *, num_items: int) -> bool:
    """One line of so many items with commas between, also ， and 、."""
    items = [item.strip(" .。") for item in re.split(r"[,，、]", answer.strip())]
    return "\n" not in answer.strip() and len(items) == num_items and all(items)


def _book_title(answer: str) -> bool:
    """The first line is nothing but a title in 《》."""
    return any(re.fullmatch(r"[#*\s]*《[^《》]*[^《》\s][^《》]*》[*\s]*", line) for line in lines(answer)[:1])


def _start(answer: str, *, start_phrase: str) -> bool:
    return answer.strip().lower().startswith(start_phrase.strip().lower())


def _ends_with_question(answer: str) -> bool:
    return re.search(r"[?？][\"'”’」』）)*]*$", answer.strip()) is not None


def _wrapped(answer: str, *, opening: str, closing: str) -> bool:
    """The whole answer is between the two, and says something."""
    bare = answer.strip()
    inside = bare.removeprefix(opening).removesuffix(closing)
    return bare == opening + inside + closing and bool(inside.strip())


def _mark_count(answer: str, *, mark: str, frequency: int, relation: str) -> bool:
    return compare(answer.count(mark), relation, frequency)


def _forbidden_marks(answer: str, *, marks: tuple[str, ...]) -> bool:
    return not any(mark in answer for mark in marks)


def _exact_frequency(answer: str, *, keyword: str, frequency: int) -> bool:
    """As a word of its own, in either case."""
    return len(word_pattern(keyword).findall(answer)) == frequency


def _in_order(answer: str, *, keywords: tuple[str, ...]) -> bool:
    """All are there, and the first places of them are in this order."""
    places = [found.start() if (found := word_pattern(word).search(answer)) else -1 for word in keywords]
    return min(places) >= 0 and places == sorted(places)


def _every_paragraph(answer: str, *, keyword: str) -> bool:
    return all(word_pattern(keyword).search(paragraph) for paragraph in paragraphs(answer))


def _every_line_starts(answer: str, *, line_start: str) -> bool:
    return all(line.startswith(line_start) for line in lines(answer))


def _acrostic(answer: str, *, word: str) -> bool:
    """The first letters of the lines, or first Chinese characters, spell the word; there are no more lines."""
    firsts = [found[0] for line in lines(answer) if (found := re.search(r"[^\W\d_]", line))]
    return "".join(firsts).lower() == word.lower()


def _no_word_twice(answer: str) -> bool:
    found = [word.lower() for word in words(answer)]
    return len(set(found)) == len(found)


def _same_initial(answer: str, *, letter: str) -> bool:
    found = words(answer)
    return bool(found) and all(word[0].lower() == letter.lower() for word in found)


def _no_digits(answer: str) -> bool:
    return not any(letter.isdigit() for letter in answer)


def _number_count(answer: str, *, frequency: int, relation: str) -> bool:
    """Numbers in digits; 3.5 and 1,000 are one each."""
    return compare(len(NUMBER.findall(answer)), relation, frequency)


def _emoji(answer: str, *, num_emoji: int, relation: str) -> bool:
    return compare(len(EMOJI.findall(answer)), relation, num_emoji)


def _no_latin(answer: str) -> bool:
    return re.search(r"[A-Za-zＡ-Ｚａ-ｚ]", answer) is None


OWN = {
    "length_constraints:number_characters": Kind(_number_characters, {"num_characters": count, "relation": relation}),
    "length_constraints:chinese_characters": Kind(_chinese_characters, {"num_characters": count, "relation": relation}),
    "length_constraints:characters_in_line": Kind(_characters_in_line, {"num_characters": count}),
    "length_constraints:number_lines": Kind(_number_lines, {"num_lines": count, "relation": relation}),
    "length_constraints:blank_line_paragraphs": Kind(
        _blank_line_paragraphs, {"num_paragraphs": count, "relation": relation}
    ),
    "length_constraints:sentence_words": Kind(_sentence_words, {"max_words": count}),
    "length_constraints:word_range": Kind(_word_range, {"min_words": count, "max_words": count}),
    "detectable_format:numbered_list": Kind(_numbered_list, {"num_items": count}),
    "detectable_format:table": Kind(_table, {"num_rows": count}),
    "detectable_format:code_block": Kind(_code_block, {"code_language": text}),
    "detectable_format:headings": Kind(_headings, {"num_headings": count}),
    "detectable_format:json_keys": Kind(_json_keys, {"keys": texts}),
    "detectable_format:one_of": Kind(_one_of, {"options": texts}),
    "detectable_format:comma_list": Kind(_comma_list, {"num_items": count}),
    "detectable_format:book_title": Kind(_book_title),
    "startend:start_checker": Kind(_start, {"start_phrase": text}),
    "startend:question_end": Kind(_ends_with_question),
    "startend:wrapped": Kind(_wrapped, {"opening": text, "closing": text}),
    "punctuation:mark_count": Kind(_mark_count, {"mark": character, "frequency": count, "relation": relation}),
    "punctuation:forbidden_marks": Kind(_forbidden_marks, {"marks": texts}),
    "keywords:exact_frequency": Kind(_exact_frequency, {"keyword": text, "frequency": count}),
    "keywords:in_order": Kind(_in_order, {"keywords": texts}),
    "keywords:every_paragraph": Kind(_every_paragraph, {"keyword": text}),
    "keywords:every_line_starts": Kind(_every_line_starts, {"line_start": text}),
    "keywords:acrostic": Kind(_acrostic, {"word": text}),
    "keywords:no_word_twice": Kind(_no_word_twice),
    "keywords:same_initial": Kind(_same_initial, {"letter": character}),
    "detectable_content:no_digits": Kind(_no_digits),
    "detectable_content:number_count": Kind(_number_count, {"frequency": count, "relation": relation}),
    "detectable_content:emoji": Kind(_emoji, {"num_emoji": count, "relation": relation}),
    "language:no_latin": Kind(_no_latin),
}
