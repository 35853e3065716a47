"""Whether a text answers a prompt or continues it: the signs of a base model at work.

In: the conversation that was put, and what the model said. Out: why it does not answer, with an excerpt, or None.

A base model writes on: the rest of the question, the next questions of the sheet, options to tick, the next turn of the
conversation, the worries of whoever asked. An assistant may quote the question, and may end with one of courtesy.
"""

import re
from collections.abc import Callable

from jax_sft.data.conversation import Conversation, Message
from jax_sft.data.quality.answers import empty_answer, repeats_prompt
from jax_sft.data.quality.remains import boilerplate
from jax_sft.data.quality.text import Finding, View, around, is_cjk, squeezed, tokens, without_code

_SENTENCE = re.compile(r"[^.!?。！？\n]*(?:[.!?]+(?=[\s\"')\]*_”’）]|$)[\"')\]*_”’）]*|[。！？]+[”』」）]*|[.!?]+|\n|$)")
_MARK = re.compile(r"^\s*(?:[-*+•]\s+|#+\s*|[（(]?\d+\s*[.)、．）:：]\s*|[a-zA-Z][.)]\s+|\*\*)*")
_NUMBERED = re.compile(r"^\s*(?:[-*+•]|[（(]?\d+\s*[.)、．）])\s*")
_HEADED = re.compile(r"\s*(?:#+\s|>\s|\*\*|__|[\"“「『《])")  # as a title or quoted, not as the text itself
_QUOTED = re.compile(r"\"[^\"\n]*\"|“[^”\n]*”|「[^」\n]*」|『[^』\n]*』|《[^》\n]*》|^>.*$", re.MULTILINE)

SHORT_OPTIONS = 160  # characters from the first to the third of them: a list of paragraphs is none
COURTESIES = 2  # questions at the end that an answer may have

_CUT_IN = re.compile(r"\s*[,;?!，；？！、。）)]")
_USER_TURN = re.compile(
    r"^[ \t]*(?:#+\s*|\*\*)?(?:(?:user|human|student|asker|customer|instruction|input)\s*\d*|用户|提问者?|提问|学生|指令|我问)"
    r"\s*(?:\*\*)?[:：]|^[ \t]*(?:#+\s*|\*\*)?(?:Question|Q)\s*\d*\s*(?:\*\*)?[:：.]|"
    r"^[ \t]*(?:\*\*)?(?:问题?|题目?)\s*[\d一二三四五六七八九十]*\s*[:：].*(?:[?？]|吗|呢)\s*(?:\*\*)?$|^[ \t]*问[:：]|"
    r"<\|(?:im_start\|>\s*user|user|start_header_id)|\[INST\]|</s>",
    re.MULTILINE | re.IGNORECASE,
)
_OWN_TURN = re.compile(r"\n[ \t]*(?:assistant|助手|助理|ai|bot)\s*[:：]|<\|(?:im_start\|>\s*)?assistant", re.IGNORECASE)
_OPTION = re.compile(r"(?<![\w])[(（]?([A-Da-d])\s?[.)、．）:：]\s*(?=\S)")
_BLANKS = re.compile(r"_{3,}|[（(](?:\s{1,}|\u3000+)[）)]")
_SHEET = re.compile(
    r"\b(?:exercise|problem|task|question|activity|worksheet|lesson)\s*(?:no\. ?)?\d+\b|\banswer key\b|"
    r"[(\[]\s*\d+\s*(?:points?|marks?)\s*[)\]]|[（(]\s*(?:本题)?\s*\d+\s*分\s*[）)]|参考答案|【答案】|【解析】|"
    r"答案[:：].*\n+\s*解析|(?:练习|例题?|习题|问题)\s*[\d一二三四五六七八九十]+\s*[:：、.]|"
    r"第\s*[\d一二三四五六七八九十]+\s*题|(?:单选|多选|选择|填空|判断|简答)题",
    re.IGNORECASE,
)
_LATER_ITEM = re.compile(r"\s*[（(]?(?:[2-9]|[1-9]\d)\s*[.)、．）]\s*(?=[^\W\d])|\s*(?:[二三四五六七八九])、")
_MORE_DEMANDS = re.compile(
    r"\s*(?:(?:the|your) (?:poem|answer|essay|text|story|summary|code|function|program|response|letter|e-?mail|output|"
    r"translation|sentence|paragraph|list|object)s? (?:should|must|needs? to|has to|may)\b|"
    r"(?:explain|justify|support|check) your\b|give (?:reasons|examples)\b|show your work|use (?:at least|no more|the follow"
    r"ing)|you (?:must|may|should) (?:use|write|include|answer|give)\b|write your answer|be sure to (?:use|include|write)|"
    r"(?:do not|don't) use (?:more|any|the)\b)|"
    r"\s*(?:具体|写作)?要求[:：]|\s*[^。\n]{0,12}(?:不少于|不超过|字数)[^。\n]{0,6}(?:字|个|$)|\s*(?:并)?(?:说明|简述)?(?:你的)?理由|"
    r"\s*请(?:结合|说明|举例|写出|根据|用一句|简要|你|将|把|选出|选择|回答)",
    re.IGNORECASE,
)
_TASK = re.compile(
    r"(?:please )?(?:translate|summari[sz]e|explain|describe|define|discuss|calculate|complete the|fill in|answer the|"
    r"choose the|read the|name (?:a|an|the|two|three|four|five)|write (?:a|an|the|down)|list (?:the|two|three|four|five)|"
    r"give (?:a|an|the|two|three|me)|which of|true or false)\b|"
    r"(?:请|把.{1,14}翻译|将.{1,14}翻译|翻译|概括|解释|简述|计算|填空|判断|阅读|写一|写出|描述|说说|谈谈|列出|列举|用.{1,12}(?:写|概括))",
    re.IGNORECASE,
)
_ASKER = re.compile(
    r"\bthanks? (?:you )?(?:in advance|for (?:any|your) help)|\bany (?:help|advice|ideas?|suggestions?)\b[^.!?\n]{0,20}(?:appreciated"
    r"|welcome|\?)|\b(?:please|can (?:some|any)(?:one|body)) help\b|\bfor my (?:homework|class|assignment)|"
    r"^\s*(?:I(?:'m| am) (?:trying|asking|wondering|writing|doing|looking|new|stuck|a (?:student|beginner))|"
    r"I(?:'ve| have) (?:tried|been trying|searched|looked|read|heard)|I (?:need|want|tried|would like) to|"
    r"I (?:don't|do not) (?:know|understand)|I (?:know|heard|think) that|My (?:teacher|friend|homework))\b|"
    r"谢谢大家|谢谢各位|在线等|跪求|求助|求大神|有没有人|有谁知道|急[!！]{1,}|^\s*(?:我想(?:知道|问|请教)|我(?:正在|最近在|试过|查了|不知道|不明白)|"
    r"老师(?:说|让)|请问)",
    re.IGNORECASE,
)
_FORUM = re.compile(
    r"\b(?:asked|posted|answered|edited) (?:by|on|\d+ \w+ ago)\b|\b\d+ (?:answers|replies|comments|views|votes)\b|\bbest answer\b|"
    r"最佳答案|网友|楼主|上一篇|下一篇|相关(?:问题|阅读|推荐)|(?:来源|作者|编辑|发布时间)\s*[:：]|\d+个回答|知乎|百度知道",
    re.IGNORECASE,
)
_COURTESY = re.compile(
    r"\b(?:would you|do you (?:want|need|have|like|prefer)|shall i|should i|can i|may i|could you|can you|let me know|what about "
    r"you|how about you|and you|anything else|does that|does this|is there (?:a|any|some)|are you|have you|how can i|which "
    r"(?:one )?(?:would|do|of)|what (?:would|do|are|brings|kind)\b.*\byou|want (?:me|to)|need (?:more|help|any)|how does that|"
    r"sound good|right)\b|您|你|需要|要不要|要我|可以吗|好吗|还有(?:什么|别的|其他)",
    re.IGNORECASE,
)
_WH = re.compile(
    r"(?:what|why|how|who|whom|whose|when|where|which|is|are|was|were|do|does|did|can|could|will|would|should|has|have)\b",
    re.IGNORECASE,
)
_WH_CJK = re.compile(r"什么|怎么|怎样|为何|为什么|谁|哪|几|多少|吗|如何|是否|何时|何地|是不是|能不能")

_ASKS_FOR_QUESTIONS = re.compile(
    r"\b(?:questions?|quiz|interview|riddles?|faq|q&a|survey|jokes?|exercises?|worksheet|test)\b|问题|提问|测验|练习|谜语|采访|面试|问卷|"
    r"笑话|考题|习题|出.{0,3}题",
    re.IGNORECASE,
)
_ASKS_FOR_TALK = re.compile(
    r"\b(?:dialogue|dialog|conversation between|interview|script|play|screenplay|transcript|faq|q&a|chat log)\b|对话|访谈|采访|剧本|问答|"
    r"聊天记录|小品",
    re.IGNORECASE,
)
_ASKS_FOR_OPTIONS = re.compile(r"\b(?:options?|choices?|choose|multiple|alternatives)\b|选项|选择|选出", re.IGNORECASE)
_ASKS_FOR_BLANKS = re.compile(r"\b(?:blanks?|template|form|fill|gaps?|placeholders?)\b|填空|模板|表格|空格|条", re.IGNORECASE)
_ASKS_FOR_LETTERS = re.compile(
    r"\b(?:draft|compose|e-?mail|letter|post|message|note|story|speech|poem|diary|pretend|role|translate|continue|complete)\b|"
    r"写[一张封篇首段则份]|信|邮件|作文|帖子|故事|诗|日记|扮演|翻译|续写|草拟",
    re.IGNORECASE,
)
_ASKS_FOR_SAME_TEXT = re.compile(
    r"\b(?:translate|rewrite|rephrase|paraphrase|correct|proofread|edit)\b|翻译|改写|改成|润色|改错|修改", re.IGNORECASE
)


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
    said = _without_heading(text)
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


def _without_heading(text: str) -> str:
    """The text without a first line that quotes the question or has it for a title, if more follows."""
    first, _, rest = text.strip().partition("\n")
    return rest if rest.strip() and _HEADED.match(first) else text


def _echo(prompt: str, text: str) -> Finding | None:
    """The first sentence is the prompt's first one, and not as a title or a quotation with an answer after it."""
    said, asked = _sentences(text), _sentences(prompt)
    if not said or not asked or _HEADED.match(text):
        return None
    one, other = squeezed(said[0]), squeezed(asked[-1])
    least = 4 if is_cjk(prompt) else 10
    if len(one) >= least and one in (other, squeezed(asked[0])):
        return Finding("repeats prompt: the answer begins with its question", text)
    return None


def _cuts_in(prompt: str, text: str) -> Finding | None:
    del prompt
    return Finding("goes on with the question's sentence", text) if _CUT_IN.match(text) else None


def _next_turn(prompt: str, text: str) -> Finding | None:
    if _ASKS_FOR_TALK.search(prompt):
        return None
    if match := _USER_TURN.search(text) or _OWN_TURN.search(text):
        return Finding("writes the next turn of the conversation", around(text, *match.span()))
    return None


def _sheet(prompt: str, text: str) -> Finding | None:
    """What stands on sheets of exercises: options, blanks, numbers of tasks, points, the rest of a list."""
    options = list(_OPTION.finditer(text))
    letters = [m[1].upper() for m in options]
    if letters[:3] == ["A", "B", "C"] and not (_ASKS_FOR_OPTIONS.search(prompt) or _OPTION.search(prompt)):
        if options[2].start() - options[0].start() <= SHORT_OPTIONS:
            return Finding("writes options to choose from", around(text, *options[0].span()))
    if (match := _BLANKS.search(text)) and not _ASKS_FOR_BLANKS.search(prompt) and not _BLANKS.search(prompt):
        return Finding("writes blanks to fill in", around(text, *match.span()))
    if _ASKS_FOR_QUESTIONS.search(prompt):
        return None
    if match := _SHEET.search(text):
        return Finding("writes a sheet of exercises", around(text, *match.span()))
    if match := _LATER_ITEM.match(text):
        return Finding("goes on with a list that the prompt did not begin", around(text, *match.span()))
    return None


def _demands(prompt: str, text: str) -> Finding | None:
    """More of what the asker wants: "The poem should rhyme", or the next tasks."""
    if match := _MORE_DEMANDS.match(text):
        return Finding("goes on with demands of the asker", around(text, *match.span()))
    if _ASKS_FOR_QUESTIONS.search(prompt):
        return None
    lines = [_MARK.sub("", line) for line in text.splitlines() if line.strip()]
    tasks = [line for line in lines if _TASK.match(line)]
    if tasks and (2 * len(tasks) >= len(lines) >= 2 or (_TASK.match(prompt) and _begin_alike(tasks[0], prompt))):
        return Finding("goes on with more tasks", tasks[0])
    return None


def _begin_alike(one: str, other: str) -> bool:
    count = 4 if is_cjk(other) else 3
    first, second = tokens(one)[:count], tokens(other)[:count]
    return len(first) == count and first == second


def _asks_on(prompt: str, text: str) -> Finding | None:
    """More questions, of which those of courtesy at the end and those in quotation marks are none."""
    if _ASKS_FOR_QUESTIONS.search(prompt) or (_ASKS_FOR_SAME_TEXT.search(prompt) and re.search("[?？]", prompt)):
        return None
    sentences = _sentences(_QUOTED.sub(" ", text))
    kept = len(sentences)
    while kept > max(0, len(sentences) - COURTESIES) and _is_courteous(sentences[kept - 1]):
        kept -= 1
    rest = sentences[:kept]
    questions = [s for s in rest if _is_question(s)]
    if not questions:
        return None
    if len(questions) == len(rest) or (len(questions) >= 2 and len(questions) >= 0.4 * len(rest)):
        return Finding("asks where it should answer", questions[0])
    first_line = text.strip().split("\n")[0].strip()
    if first_line == rest[0] == questions[0] and _is_whole(first_line):
        return Finding("begins with a question on a line of its own", first_line)
    for question in questions:
        if _is_like(question, prompt):
            return Finding("goes on with the next question", question)
    return None


def _is_question(sentence: str) -> bool:
    return sentence.rstrip(" *_\"')]）”』」").endswith(("?", "？"))


def _is_courteous(sentence: str) -> bool:
    return _is_question(sentence) and _COURTESY.search(sentence) is not None


def _is_whole(question: str) -> bool:
    """Not "Why?" or "为什么呢？", with which an answer may well begin."""
    if is_cjk(question):
        return len(tokens(question)) >= 6 and _WH_CJK.search(question) is not None
    return len(tokens(question)) >= 4 and _WH.match(_MARK.sub("", question)) is not None


def _is_like(question: str, prompt: str) -> bool:
    """Whether both have half of their words in common: "What is the capital of Spain?" after one about France."""
    asked = [s for s in _sentences(prompt) if _is_question(s)]
    words = set(tokens(question))
    return any(len(words & set(tokens(s))) >= 0.5 * len(words | set(tokens(s))) for s in asked)


def _asker(prompt: str, text: str) -> Finding | None:
    """What people write who ask: that they are stuck, and thanks in advance."""
    if _ASKS_FOR_LETTERS.search(prompt):
        return None
    match = _ASKER.search(text)
    return match and Finding("speaks as the one who asks", around(text, *match.span()))


def _page(prompt: str, text: str) -> Finding | None:
    """The page that a question stands on: who asked it and when, how many answers there are."""
    match = _FORUM.search(text)
    if match is None or match[0].casefold() in prompt.casefold():
        return None
    return Finding("writes a page around the question", around(text, *match.span()))


def _sentences(text: str) -> list[str]:
    """Sentences and lines that have letters or digits, marks of lists in front of them included."""
    return [s.strip() for s in _SENTENCE.findall(text) if re.search(r"[^\W_]", _NUMBERED.sub("", s))]


_RULES: tuple[Callable[[str, str], Finding | None], ...] = (_cuts_in, _next_turn, _sheet, _demands, _asks_on)
