"""The codes of languages: what people write (uk-UA, zh_CN, eng), and what the model answers."""

from pipelines.errors import did_you_mean

# The labels of fastText's lid.176.
LABELS = frozenset(
    """
    af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb
    co cs cv cy da de diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he
    hi hif hr hsb ht hu hy ia id ie ilo io is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez
    li lmo lo lrc lt lv mai mg mhr min mk ml mn mr mrj ms mt mwl my myv mzn nah nap nds ne new nl nn
    no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah sc scn sco sd sh si sk sl so sq
    sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa war wuu xal xmf yi yo
    yue zh
    """.split()
)
# Other codes of the same languages: ISO 639-2 and -3, and codes withdrawn since.
SYNONYMS = {
    "ara": "ar", "ces": "cs", "cmn": "zh", "dan": "da", "deu": "de", "ell": "el", "eng": "en",
    "fin": "fi", "fra": "fr", "heb": "he", "hin": "hi", "hun": "hu", "ind": "id", "in": "id",
    "ita": "it", "iw": "he", "jpn": "ja", "kor": "ko", "nb": "no", "nld": "nl", "nob": "no",
    "pol": "pl", "por": "pt", "ron": "ro", "rus": "ru", "spa": "es", "swe": "sv", "tha": "th",
    "tur": "tr", "ukr": "uk", "vie": "vi", "zho": "zh",
}  # fmt: skip
# By the first word of the Unicode names of their letters; every other language is written in LATIN.
SCRIPTS: dict[str, frozenset[str]] = {
    **dict.fromkeys(
        "av ba be bg bxr ce cv kk krc kv ky lez mhr mk mn mrj myv os ru rue sah tg tt tyv uk xal"
        .split(),
        frozenset({"CYRILLIC"}),
    ),
    **dict.fromkeys(
        "ar arz azb ckb fa lrc mzn pnb ps sd ug ur".split(), frozenset({"ARABIC"})
    ),
    **dict.fromkeys(
        "bh dty gom hi mai mr ne new sa".split(), frozenset({"DEVANAGARI"})
    ),
    **dict.fromkeys("az bs kk ku sh sr tk uz".split(), frozenset({"LATIN", "CYRILLIC", "ARABIC"})),
    **dict.fromkeys("wuu yue zh".split(), frozenset({"CJK"})),
    **dict.fromkeys("as bn bpy".split(), frozenset({"BENGALI"})),
    **dict.fromkeys("he yi".split(), frozenset({"HEBREW"})),
    "am": frozenset({"ETHIOPIC"}), "bo": frozenset({"TIBETAN"}), "dv": frozenset({"THAANA"}),
    "el": frozenset({"GREEK"}), "gu": frozenset({"GUJARATI"}), "hy": frozenset({"ARMENIAN"}),
    "ja": frozenset({"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"}),
    "ka": frozenset({"GEORGIAN"}), "xmf": frozenset({"GEORGIAN"}), "km": frozenset({"KHMER"}),
    "kn": frozenset({"KANNADA"}), "ko": frozenset({"HANGUL", "CJK"}), "lo": frozenset({"LAO"}),
    "ml": frozenset({"MALAYALAM"}), "my": frozenset({"MYANMAR"}), "or": frozenset({"ORIYA"}),
    "pa": frozenset({"GURMUKHI"}), "si": frozenset({"SINHALA"}), "ta": frozenset({"TAMIL"}),
    "te": frozenset({"TELUGU"}), "th": frozenset({"THAI"}),
}  # fmt: skip
LATIN = frozenset({"LATIN"})
# Their alphabets, lower case. Other languages in Cyrillic have letters of their own besides.
ALPHABETS = {
    "be": frozenset("абвгдеёжзійклмнопрстуўфхцчшыьэюя"),
    "bg": frozenset("абвгдежзийклмнопрстуфхцчшщъьюя"),
    "mk": frozenset("абвгдѓежзѕијклљмнњопрстќуфхцчџш"),
    "ru": frozenset("абвгдеёжзийклмнопрстуфхцчшщъыьэюя"),
    "uk": frozenset("абвгґдеєжзиіїйклмнопрстуфхцчшщьюя"),
}
ALPHABET_LETTERS = frozenset().union(*ALPHABETS.values())


def language_label(code: str) -> str:
    """Return the model's label for a code; raises ValueError where it knows no such language.

    >>> language_label("uk-UA"), language_label("zh_CN"), language_label("eng")
    ('uk', 'zh', 'en')
    """
    base = code.strip().lower().replace("_", "-").split("-")[0]
    label = SYNONYMS.get(base, base)
    if label not in LABELS:
        hint = did_you_mean(label, sorted(LABELS))
        raise ValueError(f"no such language {code!r}{hint}; use ISO 639-1 codes as en, uk or zh")
    return label


def scripts_of(label: str) -> frozenset[str]:
    """Return the scripts that a language is written in, as Unicode names its letters."""
    return SCRIPTS.get(label, LATIN)


def can_spell(label: str, text: str) -> bool:
    """Say whether a text has no letter that is another alphabet's; True where it is not known.

    >>> can_spell("uk", "Вы"), can_spell("ru", "Вы"), can_spell("kk", "Вы")
    (False, True, True)
    """
    letters = ALPHABET_LETTERS.intersection(text.lower())
    return letters <= ALPHABETS.get(label, ALPHABET_LETTERS)
