"""Patterns of texts that continue a prompt, and of prompts that make such a text sound. English and Chinese.

In: nothing. Out: compiled patterns; `continuing` says which of them counts where.
"""

import re


def _any(*parts: str, flags: int = 0) -> re.Pattern[str]:
    return re.compile("|".join(parts), re.IGNORECASE | flags)


# Parts of a text.
SENTENCE = re.compile(
    r"(?:[^.!?。！？\n]|[.!?](?=\w))*(?:[.!?]+(?=[\s\"')\]*_”’）]|$)[\"')\]*_”’）]*|[。！？]+[”』」）]*|[.!?]+|\n|$)",
)
MARK = re.compile(r"^\s*(?:[-*+•]\s+|#+\s*|[（(]?\d+\s*[.)、．）:：]\s*|[a-zA-Z][.)]\s+|\*\*)*")  # in front of an item
HEADED = re.compile(r"\s*(?:#+\s|>\s|\*\*|__|[\"“「『《])")  # as a title or quoted, not as the text itself
QUOTED = re.compile(r"\"[^\"\n]*\"|“[^”\n]*”|「[^」\n]*」|『[^』\n]*』|《[^》\n]*》|^>.*$", re.MULTILINE)
LED_IN = re.compile(r"[^\W\d_]{2,}[:：]\s*\w")  # "Ask yourself: where did I come from?"

# The next turn of the conversation.
CUTS_IN = re.compile(r"\s*[,;?!，；？！、。）)]")
_BOLD = r"^[ \t]*(?:#+\s*|\*\*)?"
USER_TURN = _any(
    _BOLD + r"(?:user|human|student|asker|customer|instruction|input)\s*(?:\d+\s*)?(?:\*\*)?[:：]",
    _BOLD + r"(?:用户|提问者?|学生|指令|问)\s*(?:\*\*)?[:：]",
    _BOLD + r"(?:question|q)\s*(?:\d+\s*)?(?:\*\*)?[:：.]",
    _BOLD + r"(?:问题|题目)\s*(?:[\d一二三四五六七八九十]+\s*)?[:：].*(?:[?？]|吗|呢)\s*(?:\*\*)?$",
    r"<\|(?:im_start\|>\s*user|user|start_header_id)|\[INST\]",
    flags=re.MULTILINE,
)
OWN_TURN = _any(r"\n[ \t]*(?:assistant|助手|助理|ai|bot)\s*[:：]", r"<\|(?:im_start\|>\s*)?assistant")

# Sheets of exercises.
OPTION = re.compile(r"(?<!\w)[（(]?([A-Da-d])\s?[.)、．）:：]\s*(?=\S)")
BLANKS = re.compile(r"_{3,}|\(\s{2,}\)|（\s+）")
SHEET = _any(
    r"^[^\w\n]*(?:exercise|problem|task|question|activity|worksheet|lesson)\s*(?:no\. ?)?\d+\b",
    r"\banswer key\b",
    r"[(\[]\s*\d+\s*(?:points?|marks?)\s*[)\]]",
    r"[（(]\s*(?:本题\s*)?\d+\s*分\s*[）)]",
    r"参考答案|【答案】|【解析】|答案[:：].*\n+\s*解析",
    r"(?:练习|例题?|习题|问题)\s*[\d一二三四五六七八九十]+\s*[:：、.]",
    r"第\s*[\d一二三四五六七八九十]+\s*题|(?:单选|多选|选择|填空|判断|简答)题",
    flags=re.MULTILINE,
)
LATER_ITEM = re.compile(r"\s*[（(]?(?:[2-9]|[1-9]\d)\s*[.)、．）]\s*(?=[^\W\d])|\s*[二三四五六七八九]、")
SHEET_TASK = _any(  # stands on sheets, and hardly ever in a list of steps
    r"(?:translate|summari[sz]e|explain|describe|define|discuss|calculate|compare|state|true or false)\b",
    r"(?:draw an?|complete the|fill in|answer the|choose the|(?:name|give) (?:two|three|four|five))\b",
    r"(?:请(?!问)|翻译|概括|解释|简述|计算(?!机)|填空|判断|阅读|说明|描述|谈谈|列举|比较).*[^：:]$",
)
ONE_VERB = _any(  # with which a text that answers hardly ever begins, if the prompt began with it
    r"(?:translate|summari[sz]e|explain|describe|define|discuss|calculate|compute|compare)\b",
    r"(?:complete|write|rewrite|suggest)\b",
)
GREETS = _any(r"(?:hello|hi|hey|good|thanks?|welcome)\b", r"你好|您好|谢|早上好|晚上好")
NO_TASK = _any(  # with these words statements begin, not demands
    r"(?:I|my|we|our|you|your|he|his|she|her|it|its|they|their|this|that|these|those|there)\b",
    r"(?:here|the|an?|in|on|at|for|to)\b",
    r"(?:from|with|by|as|and|but|so|if|when|while|after|before|since|because)\b",
    r"(?:based|given|according|yes|no|not|ok|okay)\b",
)
TASK_CJK = re.compile(
    r"(?:请你?|麻烦|帮我|给我|为我)?(?:把|将|用|对|写|翻译|概括|解释|简述|计算|阅读|描述|说|谈|讲|列|介绍|总结|改写|比较|推荐|"
    r"举|设计|编|生成|分析|提供|创作|画|做|找|给)"
)
POLITE = _any(r"\s*(?:can|could|would|will) (?:you|i|we)\b|.*\b(?:please|help)\b", r".*(?:请|帮|能不能|可以.*吗)")
IT_SHOULD = _any(r"(?:the|your) (\w+?)s? (?:should|must|needs? to|has to) ")
YOURS_SHOULD = _any(r"your (\w+?)s? (?:should|must|needs? to|has to) ")
DEMANDS = _any(
    r"\s*(?:explain|justify|support|check|round|express) your\b",
    r"\s*(?:give (?:reasons|examples)|show your work|use (?:at least|no more|the following)|write your answer)\b",
    r"\s*you (?:must|may|should) (?:use|write|include|answer|give)\b",
    r"\s*(?:be sure to (?:use|include|write)|(?:do not|don't) use (?:more|any|the))\b",
    r"\s*(?:具体|写作)?要求[:：]",
    r"\s*[^。\n]{0,12}(?:不少于|不超过|字数)[^。\n]{0,6}(?:字|个|$)",
    r"\s*并?(?:说明|简述)?你?的?理由",
    r"\s*请(?:结合|说明|举例|写出|根据|用一句|简要|把|将|选出|选择|回答)",
)

# Who asks, and the page that the question stands on.
ASKER = _any(
    r"\bthanks? (?:you )?(?:in advance|for (?:any|your) help)",
    r"\b(?:any|some) (?:help|advice|ideas?|suggestions?)\b[^.!?\n]{0,20}(?:appreciated|welcome)",
    r"(?:^|[.!?] )any (?:help|advice|ideas?|suggestions?)\?",
    r"\bwould love (?:some|any|your)\b|\b(?:please|can (?:some|any)(?:one|body)) help\b",
    r"\bfor my (?:homework|class|assignment)\b",
    r"^\s*I(?:'m| am) (?:trying|asking|wondering|writing|doing|looking|new|stuck|a (?:student|beginner))\b",
    r"^\s*I(?:'ve| have) (?:tried|been|searched|looked|read|heard)\b",
    r"^\s*(?:I|we) (?:need|want|tried|would like) to\b|^\s*we(?:'re| are) (?:planning|going|looking|trying)\b",
    r"^\s*I (?:don't|do not) (?:know|understand)\b|^\s*I (?:know|heard) that\b",
    r"^\s*I (?:was|had|got|bought|went|live|work|use|lost|started|just|only|always|never|spilled|already)\b",
    r"\bmy (?:sister|brother|wife|husband|mother|mom|mum|dad|father|son|daughter|girlfriend|boyfriend|roommate)\b",
    r"\bmy (?:boss|teacher|homework|house|flat|apartment|car|dog|cat)\b",
    r"谢谢(?:大家|各位)|在线等|跪求|^求助|求大神|求推荐|有没有人|有谁知道|谁能(?:帮|告诉)|帮帮我|急[死!！]+",
    r"^\s*我(?:现在|想(?:知道|问|请教)|正在|最近|试过|查了|不明白|今天|昨天|明天|第一次)",
    r"^\s*(?:我们(?:正在|打算|想)|老师(?:说|让)|请问(?!您|你))",
    r"我(?:老婆|老公|妈|爸|儿子|女儿|同学|室友|家的)",
)
PAGE = _any(
    r"\bin (?:this|today's) (?:article|post|blog|tutorial|video)\b",
    r"\bour readers\b|^related(?: \w+)?:|\bbest answer:",
    r"(?:^|[-–|·,] ?)(?:originally )?(?:asked|posted|answered|edited)(?: (?:by|on|\d+ \w+ ago)\b|:)",
    r"\b\d+ (?:answers|replies|comments|votes)\b",
    r"本文(?:将|为|介绍)|小编|最佳答案|网友|楼主|上一篇|下一篇|相关(?:问题|阅读|推荐)",
    r"^(?:来源|作者|编辑|发布时间)\s*[:：]|\d+个回答|知乎|百度知道",
    flags=re.MULTILINE,
)

# Questions.
COURTESY = _any(
    r"\b(?:would you|do you (?:want|need|have|like|prefer|think)|shall i|should i|can i|may i|could you|can you)\b",
    r"\b(?:your|let me know|(?:what|how) about|and you|anything else|does (?:that|this)|is there (?:a|any|some))\b",
    r"\b(?:are you|have you|how can i|how does that|sound good|want (?:me|to)|need (?:more|help|any))\b",
    r"\bwhich (?:one )?(?:would|do|of)\b|\bwhat (?:would|do|are|brings|kind)\b.*\byou\b|\bwho are you\b|\bright\b",
    r"\b(?:how|has|have) .*\b(?:your?|lately|coming along)\b|\bdo any of these\b|\bis the \w+ .* or\b",
    r"您|你|需要|要不要|要我|可以吗|好吗|还有(?:什么|别的|其他)|怎么样了|还是",
)
INTERROGATIVE = re.compile(
    r"(?:what|why|how|who|whom|whose|when|where|which|is|are|was|were|do|does|did|can|could|will|would|should|has|have)"
    r"\b",
    re.IGNORECASE,
)
INTERROGATIVE_CJK = re.compile(r"什么|怎么|怎样|为何|谁|哪|几|多少|吗|如何|是否|何时|何地|是不是|能不能")
ACCEPTS = _any(
    r"(?:of course|sure|certainly|gladly|happy to|i'd be|i would be|absolutely|yes|hello|hi|thanks?)\b",
    r"当然|好的|没问题|可以的?[，！。]|很高兴|你好|您好",
)

# Prompts after which some of this is just what was asked for.
ASKS_FOR_ADVICE = _any(
    r"\b(?:how|tips?|steps?|ways?|advice|plan(?:ning)?|checklist|to-do|instructions?)\b",
    r"建议|步骤|方法|怎么|如何|计划|清单",
)
ASKS_FOR_ARTICLE = _any(r"\b(?:article|post|blog|tutorial|video|chapter|lesson|page)s?\b", r"文章|推文|博客|教程|论文")
ASKS_FOR_QUESTIONS = _any(
    r"\b(?:questions?|quiz|interview|riddles?|faq|q&a|survey|jokes?|exercises?|worksheet|test)\b",
    r"问题|提问|测验|练习|谜语|采访|面试|问卷|笑话|考题|习题|出.{0,3}题",
)
ASKS_FOR_TALK = _any(
    r"\b(?:dialog(?:ue)?|conversation between|interview|script|play|screenplay|transcript|faq|q&a|chat log)\b",
    r"对话|访谈|采访|剧本|问答|聊天记录|小品",
)
ASKS_FOR_OPTIONS = _any(r"\b(?:options?|choices?|choose|multiple|alternatives)\b", r"选项|选择|选出")
ASKS_FOR_BLANKS = _any(r"\b(?:blanks?|template|form|fill|gaps?|placeholders?)\b", r"填空|模板|表格|空格|条")
ASKS_FOR_LETTERS = _any(
    r"\b(?:draft|compose|e-?mail|letter|post|message|note|story|speech|poem|haiku|song|slogan|tagline|diary|pretend|role)\b",
    r"\b(?:translate|continue|complete|example sentences?|examples?|shorter|longer|formal)\b",
    r"\b(?:into (?:english|chinese)|tell it)\b",
    r"写[一两几张封篇首段则份]|信|邮件|作文|帖子|故事|诗|日记|扮演|翻译|续写|草拟|演讲|发言|致辞|造句|例句|例子",
)
ASKS_FOR_SAME_TEXT = _any(
    r"\b(?:translate|rewrite|rephrase|paraphrase|correct|proofread|edit)\b", r"翻译|改写|改成|润色|改错|修改"
)
