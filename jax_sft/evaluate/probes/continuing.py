"""Whether a text answers a prompt or continues it: the signs of a base model at work.

In: the prompt, and what the model said. Out: why it does not answer, with an excerpt, or None.

A base model writes on: the rest of the question, the next questions of the sheet, options to tick, the next turn of the
conversation, the worries of whoever asked. An assistant may quote the question, and may end with one of courtesy. What
reads like an answer and is none (an article that goes on in plain prose) is not seen: that takes a reader.
"""

import re
from collections.abc import Callable

from jax_sft.data.conversation import Conversation, Message
from jax_sft.data.quality.answers import empty_answer, repeats_prompt
from jax_sft.data.quality.remains import boilerplate
from jax_sft.data.quality.text import Finding, View, around, is_cjk, squeezed, tokens, without_code
from jax_sft.evaluate.probes import signs

SHORT_OPTIONS = 90  # characters from the first to the third of them: a list of paragraphs is none
COURTESIES = 2  # questions at the end that an answer may have
ASKING = 0.4  # share of questions among the sentences from which on a text asks
# A part that begins with as many words as the prompt does is the next task: at the start of a text, and later on.
ALIKE, ALIKE_LATER, ALIKE_CJK, ALIKE_LATER_CJK = 2, 3, 3, 4
_WRITTEN = {"answer", "essay", "text", "function", "program", "response", "output"}  # what demands are about, unnamed


def why_no_answer(prompt: str, text: str, *, plays_role: bool = False) -> Finding | None:
    """The first sign that the text continues the prompt where it should answer it, or None.

    Args:
        prompt: the last user's turn.
        text: what the model said after it.
        plays_role: a system message gives the model a role to speak in, who may well say "I am a student".
    """
    view = _view(prompt, text)
    if found := empty_answer(view):
        return found
    said = _without_heading(prompt, text)
    if found := _echo(prompt, said) or repeats_prompt(_view(prompt, said)):
        return found
    prose = without_code(said)
    for rule in _RULES:
        if found := rule(prompt, prose):
            return found
    if not plays_role and (found := _asker(prompt, prose)):
        return found
    return _page(prompt, prose) or boilerplate(view)


def _view(prompt: str, text: str) -> View:
    return View(Conversation((Message("user", prompt), Message("assistant", text)), source="", id=""))


def _without_heading(prompt: str, text: str) -> str:
    """The text without a first line that quotes the question or has it for a title, if more follows."""
    first, _, rest = text.strip().partition("\n")
    is_heading = signs.HEADED.match(first) and (squeezed(first) == squeezed(prompt) or _is_like(first, prompt))
    return rest if is_heading and rest.strip() else text


def _echo(prompt: str, text: str) -> Finding | None:
    """The first sentence is a question of the prompt or all of it, and not set as a title or a quotation."""
    said, asked = _sentences(text), _sentences(prompt)
    if not said or not asked or signs.HEADED.match(text):
        return None
    one = squeezed(said[0])
    # Of a passage and a task below it an answer may well begin with a sentence of the passage.
    questions = [squeezed(s) for s in asked if _is_question(s) or len(asked) == 1]
    least = 4 if is_cjk(prompt) else 10
    if len(one) >= least and one in questions and not signs.GREETS.match(said[0]):
        return Finding("repeats prompt: the answer begins with its question", text)
    return None


def _cuts_in(prompt: str, text: str) -> Finding | None:
    del prompt
    return Finding("goes on with the question's sentence", text) if signs.CUTS_IN.match(text) else None


def _next_turn(prompt: str, text: str) -> Finding | None:
    if signs.ASKS_FOR_TALK.search(prompt) or signs.USER_TURN.search(prompt):
        return None
    match = signs.USER_TURN.search(text) or signs.OWN_TURN.search(text)
    return match and Finding("writes the next turn of the conversation", around(text, *match.span()))


def _sheet(prompt: str, text: str) -> Finding | None:
    """What stands on sheets of exercises: options, blanks, numbers of tasks, points, the rest of a list."""
    options = list(signs.OPTION.finditer(text))
    letters = [m[1].upper() for m in options]
    is_asked = any(p.search(prompt) for p in (signs.ASKS_FOR_OPTIONS, signs.ASKS_FOR_QUESTIONS, signs.OPTION))
    if letters[:3] == ["A", "B", "C"] and not is_asked and options[2].start() - options[0].start() <= SHORT_OPTIONS:
        return Finding("writes options to choose from", around(text, *options[0].span()))
    has_blanks = signs.ASKS_FOR_BLANKS.search(prompt) or signs.BLANKS.search(prompt)
    if (match := signs.BLANKS.search(text)) and not has_blanks and not signs.ASKS_FOR_LETTERS.search(prompt):
        return Finding("writes blanks to fill in", around(text, *match.span()))
    if signs.ASKS_FOR_QUESTIONS.search(prompt):
        return None
    if match := signs.SHEET.search(text):
        return Finding("writes a sheet of exercises", around(text, *match.span()))
    if match := signs.LATER_ITEM.match(text):
        return Finding("goes on with a list that the prompt did not begin", around(text, *match.span()))
    return None


def _demands(prompt: str, text: str) -> Finding | None:
    """More of what the asker wants: "The poem should rhyme", or the next tasks."""
    parts = [signs.MARK.sub("", part) for part in _sentences(signs.QUOTED.sub(" ", text))]
    if not _asks(prompt):
        if match := signs.DEMANDS.match(text):
            return Finding("goes on with demands of the asker", around(text, *match.span()))
        for i, part in enumerate(parts):
            match = (signs.YOURS_SHOULD if i else signs.IT_SHOULD).match(part)
            if match and (match[1].lower() in _WRITTEN or match[1].lower() in prompt.lower()):
                return Finding("goes on with demands of the asker", part)
        if same := _next_task(prompt, parts):
            return Finding("goes on with more tasks of the prompt's kind", same)
    tasks = [part for part in parts if signs.SHEET_TASK.match(part)]
    is_asked = signs.ASKS_FOR_QUESTIONS.search(prompt) or signs.ASKS_FOR_ADVICE.search(prompt)
    if len(tasks) >= 2 and 2 * len(tasks) >= len(parts) and not is_asked:
        return Finding("goes on with more tasks", tasks[0])
    return None


def _next_task(prompt: str, parts: list[str]) -> str | None:
    """The first part that begins as the prompt does, if that is a task and not a statement."""
    asked = signs.MARK.sub("", signs.QUOTED.sub(" ", prompt))
    cjk = is_cjk(asked)
    is_statement = (
        signs.TASK_CJK.match(asked) is None if cjk else signs.NO_TASK.match(asked) or signs.GREETS.match(asked)
    )
    if is_statement or signs.ASKS_FOR_ADVICE.search(prompt):
        return None
    first = ALIKE_CJK if cjk else 1 if signs.ONE_VERB.match(asked) else ALIKE
    later = ALIKE_LATER_CJK if cjk else ALIKE_LATER
    if ":" not in asked and "：" not in asked:  # "Three novels: ..." begins an answer
        parts = [part for part in parts if ":" not in part and "：" not in part]
    alike = [_words_alike(part, asked) for part in parts]
    same = [part for i, part in enumerate(parts) if alike[i] >= (later if i else first)]
    begun = [part for part, n in zip(parts, alike, strict=True) if n >= (2 if cjk else 1)]
    if len(begun) >= max(2, len(parts) / 2):  # most of the parts: the verb is enough
        same = begun
    return same[0] if same else None


def _words_alike(one: str, other: str) -> int:
    """How many words both begin with."""
    pairs = zip(tokens(one), tokens(other), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens(one)), len(tokens(other))))


def _asks_on(prompt: str, text: str) -> Finding | None:
    """More questions, of which those of courtesy at the end and those in quotation marks are none."""
    gives_question = signs.ASKS_FOR_SAME_TEXT.search(prompt) and re.search("[?？]", prompt)
    if signs.ASKS_FOR_QUESTIONS.search(prompt) or gives_question:
        return None
    sentences = _sentences(signs.QUOTED.sub(" ", text))
    kept = len(sentences)
    while kept > max(0, len(sentences) - COURTESIES) and _is_courteous(sentences[kept - 1]):
        kept -= 1
    rest = sentences[:kept]
    questions = _own_questions(rest)
    if not questions or signs.ACCEPTS.match(rest[0]):
        return None
    if len(rest) == len(sentences) == 1 and not _is_whole(re.split("[,，]", rest[0])[0]):
        return None  # "Yes, and what is it called?"
    if len(_own_questions(sentences)) == 1 and (not _asks(prompt) or signs.POLITE.match(prompt)):
        return None  # what was told or asked for calls for a question
    most = 1.0 if signs.ASKS_FOR_LETTERS.search(prompt) else ASKING  # poems and letters may well ask
    if len(questions) == len(rest) or (len(questions) >= 2 and len(questions) >= most * len(rest)):
        return Finding("asks where it should answer", questions[0])
    first_line = text.strip().split("\n")[0].strip()
    if first_line == rest[0] == questions[0] and _is_whole(first_line):
        return Finding("begins with a question on a line of its own", first_line)
    for question in questions:
        if _is_like(question, prompt):
            return Finding("goes on with the next question", question)
    return None


def _own_questions(sentences: list[str]) -> list[str]:
    """Those that no colon leads in, as in "Ask yourself: where did I come from? What did I see?"."""
    own, is_led = [], False
    for sentence in sentences:
        is_led = _is_question(sentence) and (is_led or signs.LED_IN.search(sentence) is not None)
        if _is_question(sentence) and not is_led:
            own.append(sentence)
    return own


def _is_question(sentence: str) -> bool:
    return sentence.rstrip(" *_\"')]）”』」").endswith(("?", "？"))


def _asks(prompt: str) -> bool:
    return any(_is_question(sentence) for sentence in _sentences(prompt))


def _is_courteous(sentence: str) -> bool:
    return _is_question(sentence) and signs.COURTESY.search(sentence) is not None


def _is_whole(question: str) -> bool:
    """Not "Why?" or "为什么呢？", with which an answer may well begin."""
    if is_cjk(question):
        return len(tokens(question)) >= 6 and signs.INTERROGATIVE_CJK.search(question) is not None
    return len(tokens(question)) >= 4 and signs.INTERROGATIVE.match(signs.MARK.sub("", question)) is not None


def _is_like(question: str, prompt: str) -> bool:
    """Whether both have half of their words in common: "What is the capital of Spain?" after one about France."""
    asked = [s for s in _sentences(prompt) if _is_question(s)]
    words = set(tokens(question))
    return any(len(words & set(tokens(s))) >= 0.5 * len(words | set(tokens(s))) for s in asked)


def _asker(prompt: str, text: str) -> Finding | None:
    """What people write who ask: that they are stuck, and thanks in advance."""
    if signs.ASKS_FOR_LETTERS.search(prompt) or signs.ASKS_FOR_TALK.search(prompt):
        return None
    unquoted = signs.QUOTED.sub(" ", text)
    match = signs.ASKER.search(unquoted)
    if match is None or match[0].strip().casefold() in prompt.casefold():  # the prompt's own words, put otherwise
        return None
    return Finding("speaks as the one who asks", around(unquoted, *match.span()))


def _page(prompt: str, text: str) -> Finding | None:
    """The page that a question stands on: who asked it and when, how many answers there are."""
    match = signs.PAGE.search(text)
    if match is None or signs.ASKS_FOR_ARTICLE.search(prompt) or match[0].casefold() in prompt.casefold():
        return None
    return Finding("writes a page around the question", around(text, *match.span()))


def _sentences(text: str) -> list[str]:
    """Sentences and lines that have letters or digits, marks of lists in front of them included."""
    return [s.strip() for s in signs.SENTENCE.findall(text) if re.search(r"[^\W_]", signs.MARK.sub("", s))]


_RULES: tuple[Callable[[str, str], Finding | None], ...] = (_cuts_in, _next_turn, _sheet, _demands, _asks_on)
