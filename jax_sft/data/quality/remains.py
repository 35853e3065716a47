"""What was left in texts by where they come from: wrong encodings, web pages, models that refuse.

In: a `View`. Out: what was found, or None. A prompt that is itself about HTML, cookies or AI makes their words sound.
"""

import re

from jax_sft.data.quality.text import Finding, View, around, without_code

# Bytes of UTF-8 read as Latin-1 or as Windows' code page 1252: a first byte, then one to three that follow it.
_CP1252 = (
    "\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u0160\u2039\u0152\u017d\u2018\u2019"
    "\u201c\u201d\u2022\u2013\u2014\u02dc\u2122\u0161\u203a\u0153\u017e\u0178"
)
_AS_LATIN = re.compile(
    f"(?:[\u00c2-\u00df][\u0080-\u00bf{_CP1252}]|[\u00e0-\u00ef][\u0080-\u00bf{_CP1252}]{{2}}|"
    f"\u00f0[\u0080-\u00bf{_CP1252}]{{3}})+"
)
_AS_CYRILLIC = re.compile(
    "(?:[РС][\u0080-\u00bf\u0400-\u040f\u0450-\u045f\u0490\u0491\u2013-\u203a\u20ac\u2116\u2122]){3,}"
)
_GBK_AS_LATIN = re.compile("[\u00a1-\u00fe]{4,}")
_UTF8_AS_GBK = re.compile("[\u2e80-\u9fff\ue000-\uf8ff\uff00-\uffef€]{3,}")
_OFTEN_OF_GBK = re.compile("[锛銆鐨鏄鎴鍦鐪浣涓鍙鏈杩浜鍜绗鏂瀛鏃]")  # "，。的是我在看你一可本这人和第文学日" so spoilt
_REPLACED = re.compile("\ufffd|锟斤拷|烫烫烫|屯屯屯|ï»¿|ï¿½|[\u0080-\u009f]")
_WRONG_SCRIPT_OK = ("mojibake", "encoding", "utf-8", "utf8", "乱码", "编码")

_TAG = re.compile(
    r"</?(?:div|span|p|br|hr|a|li|ul|ol|td|tr|th|table|tbody|b|i|u|strong|em|img|h[1-6]|font|center|script|style|"
    r"iframe|nav|footer|header|section|article|button|input|form|sup|sub|blockquote|label|body|html|head|meta)"
    r"(?:\s+[a-z-]+\s*=[^<>]*|\s*/?)>",
    re.IGNORECASE,
)
_ENTITY = re.compile(
    r"&(?:nbsp|amp|lt|gt|quot|apos|mdash|ndash|hellip|rsquo|lsquo|ldquo|rdquo|copy|#\d{2,5}|"
    r"#x[0-9a-fA-F]{2,5});?(?![\w=])"
)
_ABOUT_MARKUP = re.compile(
    r"html|css|xml|\btags?\b|markup|web ?page|website|javascript|react|vue|jsx|php|django|template|browser|dom\b|"
    r"标签|网页|网站|前端|页面|</?[a-z]+\b[^>]*>|&\w+;|\bsvg\b|markdown|widget|\bcode\b|代码"
)

_BOILERPLATE = {
    "a link to click": re.compile(
        r"\bclick (?:here|the link below|on the link below)\b(?! (?:is|was|are)\b)|点击(?:这里|此处|链接|下方链接|"
        r"查看(?:更多|原文|详情))|戳这里"
    ),
    "an invitation to read on": re.compile(
        r"(?:^|[.!?…\]\"”]\s+|\[)(?:(?:read|see|show|load) more\s*(?:$|[»›→>.…\]]|about\b.{0,60}\bhere\b)|"
        r"learn more\s*(?:$|[»›→>…\]]))|"
        r"\bcontinue reading\s*(?:$|[»›→>…])|阅读(?:更多|全文|原文)|展开全文|查看原文|查看全文",
        re.MULTILINE,
    ),
    "an invitation to share": re.compile(
        r"(?:^|[.!?]\s+)share (?:this|on facebook|on twitter|via email)(?: (?:post|article|page|story|"
        r"with your friends))?\s*(?:$|[:!.|])|\b(?:tweet|pin) (?:this|it)\s*$|分享到[:：]?\s*(?:微信|微博|朋友圈|qq|"
        r"$)|分享至|转发(?:到|至)朋友圈",
        re.MULTILINE,
    ),
    "a cookie banner": re.compile(
        r"\b(?:we|site|website|page) uses? cookies\b|\baccept (?:all )?cookies\b|\bcookie (?:policy|preferences|"
        r"settings)\b|使用(?:了)?\s?cookies?\b|接受(?:所有|全部)?\s?cookie"
    ),
    "an invitation to subscribe": re.compile(
        r"\bsubscribe to (?:our|the|my) (?:newsletter|channel|mailing list|blog)\b|\bsign up for (?:our|"
        r"the) newsletter\b|"
        r"\bfollow us on (?:facebook|twitter|instagram|social)|关注(?:我们的)?(?:微信)?公众号|扫码关注|"
        r"扫描(?:下方)?二维码|订阅我们的"
    ),
    "a copyright line": re.compile(
        r"\ball rights reserved\b|(?:©|\(c\)|copyright)\s*(?:©\s*)?(?:19|20)\d\d|版权所有|未经(?:许可|"
        r"授权)[^。\n]{0,8}(?:转载|复制)"
    ),
    "a page's navigation": re.compile(
        r"^\s*(?:skip to (?:main )?content|back to top|leave a (?:comment|reply)|related (?:posts|articles)|"
        r"previous post|next post|"
        r"(?:home\s*[|>»›]\s*\w+)|advertisement|posted (?:in|on|by) .{2,40}|filed under:.*)\s*:?\s*$|"
        r"^\s*(?:上一篇|下一篇|相关(?:推荐|阅读|文章)|责任编辑|返回顶部|发表评论|文章来源|本文来源|来源)\s*(?:$|[:：])",
        re.MULTILINE,
    ),
}
# If none of these is in a text, nothing of the above is; a plain search is ten times as fast.
_BOILERPLATE_SIGNS = (
    "click ",
    "点击",
    "戳这里",
    " more",
    "continue reading",
    "阅读",
    "全文",
    "查看原文",
    "share ",
    "tweet",
    "pin ",
    "分享",
    "转发",
    "cookie",
    "subscribe",
    "newsletter",
    "follow us",
    "关注",
    "扫",
    "订阅",
    "reserved",
    "©",
    "copyright",
    "(c)",
    "版权",
    "未经",
    "skip to",
    "back to top",
    "leave a ",
    "related ",
    "previous post",
    "next post",
    "home",
    "advertisement",
    "posted ",
    "filed under",
    "上一篇",
    "下一篇",
    "相关",
    "责任编辑",
    "返回顶部",
    "发表评论",
    "来源",
)
_KEYS = (
    "click",
    "点击",
    "read more",
    "learn more",
    "share",
    "分享",
    "cookie",
    "subscribe",
    "newsletter",
    "follow us",
    "关注",
    "订阅",
    "copyright",
    "版权",
    "website",
    "web page",
    "html",
    "网页",
    "email",
    "邮件",
    "公众号",
    "landing page",
    "广告",
    "advertis",
    "blog",
    "转载",
    "social media",
    "来源",
    "source",
)

_AS_AN_AI = re.compile(
    r"\bas an? (?:ai|artificial intelligence|large language model|language model)(?:[- ](?:powered|based))?"
    r"(?: language)?(?: model| assistant| chatbot| system| program)?(?: (?:developed|created|trained|"
    r"made) by \w+)?(?:,| i\b)|"
    r"\bi(?:'m| am) (?:just |only )?an? (?:ai|artificial intelligence|(?:large )?language model|"
    r"text[- ]based ai)(?: language)?(?: model| assistant| chatbot| program)?\b|"
    r"作为一?[个名款位]?(?:ai|人工智能|大?型?语言模型|大语言模型|机器人|虚拟助手)[^。！？\n]{0,14}?[，,]|"
    r"我(?:只)?是一?[个名款]?(?:ai|人工智能|大?型?语言模型)[^。！？\n]{0,12}[，,。]"
)
_CANNOT = re.compile(
    r"\bcannot\b|\bcan't\b|\bcan’t\b|\bcan not\b|\bunable\b|\bnot able\b|\bnot capable\b|\bdo(?:n't|n’t|"
    r" not) (?:have|possess|hold|experience|feel)\b|"
    r"\bincapable\b|\black\b|\bnot (?:programmed|designed|allowed|permitted|appropriate)\b|\bno (?:access|personal|"
    r"ability)\b|"
    r"无法|不能|没有|不具备|不会|不可以|不便"
)
_SORRY = re.compile(
    r"(?:sorry|apologi[sz]e|unfortunately|regret)[^.!?\n]{0,40}\b(?:cannot|can't|can’t|can not|unable to|not able to|"
    r"won't be able to)\s+"
    r"(?:\w+ ){0,2}?(?:assist|help with|fulfil+|comply|provide|generate|create|answer|complete|process|engage|"
    r"discuss|continue with|respond)|"
    r"\bi (?:cannot|can't|can’t|am unable to|am not able to) (?:assist|fulfil+|comply with|help you with|"
    r"provide (?:information|assistance|guidance|advice)|"
    r"answer (?:that|this)|engage in|generate content|complete this task)\b|"
    r"(?:抱歉|对不起|不好意思|很遗憾)[^。！？\n]{0,24}(?:无法|不能|没办法)(?:[^。！？\n]{0,8})(?:回答|提供|协助|"
    r"帮助|满足|完成|生成|处理|讨论|执行)|"
    r"我(?:无法|不能)(?:回答|协助|满足|提供)(?:您|你|这|该|此|相关)"
)
_AI_SIGNS = ("as a", "i'm a", "i am a", "just a", "only a", "作为", "我是", "我只是")
_SORRY_SIGNS = ("sorry", "apolog", "unfortunately", "regret", "i cannot", "i can't", "i can’t", "i am unable",
                "i am not able",
                "抱歉", "对不起", "不好意思", "很遗憾", "我无法", "我不能")  # fmt: skip


def mojibake(view: View) -> Finding | None:
    """Characters that come of a wrong encoding: what was found turns into sound text when the mistake is undone."""
    for text in view.texts:
        if text.isascii():
            continue
        if found := _misread(text):
            what, start, end = found
            if not any(word in view.asked for word in _WRONG_SCRIPT_OK):
                return Finding(f"mojibake: {what}", around(text, start, end))
    return None


def _misread(text: str) -> tuple[str, int, int] | None:
    if match := _REPLACED.search(text):
        return "a character that could not be decoded", *match.span()
    for match in _AS_LATIN.finditer(text):
        if _decodes(match[0], "cp1252", "utf-8") or _decodes(match[0], "latin-1", "utf-8"):
            return "UTF-8 that was read as Latin-1", *match.span()
    if (match := _AS_CYRILLIC.search(text)) and _decodes(match[0], "cp1251", "utf-8"):
        return "UTF-8 that was read as Windows-1251", *match.span()
    for match in _GBK_AS_LATIN.finditer(text):
        if len(match[0]) % 2 == 0 and _decodes(match[0], "latin-1", "gb2312"):
            return "GBK that was read as Latin-1", *match.span()
    if len(_OFTEN_OF_GBK.findall(text)) >= 2:
        for match in _UTF8_AS_GBK.finditer(text):
            data = match[0].encode("gb18030", "ignore")
            back = re.findall("[\u3000-\u9fff\uff00-\uffef]", data.decode("utf-8", "ignore"))
            if len(back) >= 2 and 3 * len(back) >= 0.75 * len(data):
                return "UTF-8 that was read as GBK", *match.span()
    return None


def _decodes(text: str, wrong: str, right: str) -> bool:
    try:
        return len(text.encode(wrong).decode(right)) < len(text)
    except UnicodeError:
        return False


def markup(view: View) -> Finding | None:
    """Tags and entities of HTML outside code, where nothing that was asked is about a page or a program."""
    for text in view.said:
        if "<" not in text and "&" not in text:
            continue
        prose = without_code(text)
        if match := _TAG.search(prose) or _ENTITY.search(prose):
            if _ABOUT_MARKUP.search(view.asked):
                return None
            what = "an HTML tag" if match[0].startswith("<") else "an HTML entity"
            return Finding(f"markup: {what}", around(prose, *match.span()))
    return None


def boilerplate(view: View) -> Finding | None:
    """What stands around the text of web pages, where nothing that was asked is about such a thing."""
    for text in view.lowered:
        if not any(sign in text for sign in _BOILERPLATE_SIGNS):
            continue
        for what, pattern in _BOILERPLATE.items():
            if match := pattern.search(text):
                if any(key in view.asked for key in _KEYS):
                    return None
                return Finding(f"boilerplate: {what}", around(text, *match.span()))
    return None


def refusal(view: View) -> Finding | None:
    """An AI that says what it is and that it cannot; or that is sorry not to help. To say what one is is no refusal."""
    for text in view.lowered:
        if any(sign in text for sign in _AI_SIGNS):
            for match in _AS_AN_AI.finditer(text):
                if _CANNOT.search(text, match.start(), match.end() + 160):
                    return Finding("refusal: an AI says what it is and cannot", around(text, *match.span(), margin=120))
        if any(sign in text for sign in _SORRY_SIGNS) and (match := _SORRY.search(text)):
            return Finding("refusal: an answer that is sorry not to help", around(text, *match.span(), margin=80))
    return None
