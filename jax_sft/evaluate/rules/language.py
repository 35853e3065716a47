"""Whether a text is in a language, told by its script, and by common small words where languages share a script.

In: a text and an ISO 639-1 code of `LANGUAGES`. Out: True or False. It needs no model, so it is the same everywhere. A
text that holds none of the small words of any language of its script may be in any of them.
"""

import collections
import re
import unicodedata

# The first word of the Unicode name of a language's letters.
_SCRIPTS = {
    "LATIN": ("en", "es", "pt", "fr", "de", "it", "vi", "pl", "sw", "fi"),
    "CJK": ("zh",),
    "HIRAGANA": ("ja",),
    "HANGUL": ("ko",),
    "CYRILLIC": ("ru", "uk", "bg"),
    "ARABIC": ("ar", "fa", "ur"),
    "DEVANAGARI": ("hi", "mr", "ne"),
    "BENGALI": ("bn",),
    "GUJARATI": ("gu",),
    "GURMUKHI": ("pa",),
    "HEBREW": ("he",),
    "KANNADA": ("kn",),
    "MALAYALAM": ("ml",),
    "TAMIL": ("ta",),
    "TELUGU": ("te",),
    "THAI": ("th",),
}
LANGUAGES = tuple(code for codes in _SCRIPTS.values() for code in codes)
_SCRIPT_OF = {code: script for script, codes in _SCRIPTS.items() for code in codes}
_DENSE = {"CJK", "HIRAGANA", "HANGUL"}  # a character of these says as much as three letters
_KANA_SHARE = 0.1  # of the characters of a text in Japanese, at least

_SMALL_WORDS = {
    code: frozenset(words.split())
    for code, words in {
        "en": "a an any about into only then than no some up out one all do see the of and to is that it for was "
        "with as on are this be at by have from or not you we they but i my your his her their if so what "
        "when there can will more would",
        "es": "a no el los las del y que es en un una por con para su se lo como más pero sus le ya este sí porque "
        "esta muy sin sobre también hay donde cuando nos todo desde al son",
        "pt": "a o os um uma do da dos das em no na nos nas não que é e com por para se mais como mas ao ele seu "
        "sua ou quando muito já também pelo pela isso são você",
        "fr": "a le les des et est un une du dans que qui pour pas sur au avec ce il elle sont nous vous plus par "
        "je son sa ses ou mais cette aux être c'est d'une",
        "de": "der die das und ist nicht ein eine zu den mit von auf für sich dem des im es auch als wird sind wir "
        "ich sie er aber oder haben wenn nach bei einen",
        "it": "a il lo gli di che è e un una per non con sono del della dei nel alla si come più anche ma questo le "
        "da al ha nella tutti essere molto i",
        "vi": "và là của có không được cho một các những với trong người này đã khi để như nhiều tôi bạn rất cũng",
        "pl": "i w nie na się z do jest to że o jak ale po co tak za od jego był przez są dla czy tylko może oraz",
        "sw": "ya na wa kwa ni katika za la kuwa hii cha hiyo watu kama yake yangu lakini pia sana au mimi wewe",
        "fi": "ja on ei se että oli hän mutta ovat kun niin myös kuin tai joka sen minä tämä voi sekä ole",
        "ru": "и в не на что с он как это по но они мы из у за от так для ты же все был бы она я к его если или",
        "uk": "і в не на що з він як це але вони ми за від так для ти та її є було вона я до його якщо або у",
        "bg": "и в не на че с той как това но те ние от за така ти са се да е беше тя аз го ако или ще към",
        "ar": "في من على أن إلى هذا هذه التي الذي مع كان عن لا ما هو هي أو كل بعد ذلك يمكن وهو",
        "fa": "در از به که این را با است برای آن یک می خود تا بر هم نیز ما شما یا اما بود باشد های کند",
        "ur": "کے میں کی ہے اور سے کا کو پر یہ ہیں نے ایک بھی کہ نہیں وہ تھا کر اس آپ ہم لیے",
        "hi": "के में की है और से का को पर यह हैं ने एक भी कि नहीं वह था कर इस आप हम लिए जो तो",
        "mr": "आहे आणि या ते हे आहेत मध्ये साठी एक होते की मी तो ती तुम्ही त्या नाही पण करून असे",
        "ne": "छ र को मा ले का हो यो छन् भने पनि एक लागि गर्न तर हामी म तपाईं थियो गर्छ छैन",
    }.items()
}


def is_in(text: str, language: str) -> bool:
    """Whether the text is in it; one without any letters is in every language.

    Args:
        text: of any length.
        language: one of `LANGUAGES`.
    """
    script = _main_script(text)
    if script is None:
        return True
    if script != _SCRIPT_OF[language]:
        return False
    rivals = _SCRIPTS[script]
    if len(rivals) == 1:
        return True
    words = re.findall(r"[^\W\d_](?:[\w'’]|[\u0900-\u097f])*", text.lower().replace("’", "'"))
    hits = {code: sum(word in _SMALL_WORDS[code] for word in words) for code in rivals}
    return hits[language] == max(hits.values())


def _main_script(text: str) -> str | None:
    """The script of most of what the text says; None without letters."""
    counts = collections.Counter(
        unicodedata.name(character, "UNKNOWN").split()[0] for character in text if character.isalpha()
    )
    kana = counts["HIRAGANA"] + counts.pop("KATAKANA", 0)
    if kana >= _KANA_SHARE * (kana + counts["CJK"]) and kana:  # Japanese is written in Chinese characters as well
        counts["HIRAGANA"] = kana + counts.pop("CJK", 0)
    weights = {script: n * (3 if script in _DENSE else 1) for script, n in counts.items()}
    return max(weights, key=lambda script: weights[script]) if any(weights.values()) else None
