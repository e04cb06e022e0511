"""Streets with house numbers, post boxes and postcodes in the United States, Britain, Germany, France and Spain.

The city beside a postcode is part of the ADDRESS in Europe; in "Springfield, IL 62704" it is a LOCATION, the state is
left, and the code is a ZIP.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from whet.data.redact.recognizers import NEAR, Anchored, Document, Labelled, Span

CAP = r"[A-ZÀ-ÖØ-Ý0-9][\w'\u2019.\-]{0,30}"
STREET_WORD = r"(?:[A-ZÀ-ÖØ-Ý][\w'\u2019\-]{0,30}\.?|[0-9]{1,3}(?:st|nd|rd|th))"
SUFFIXES = (
    "Alley|Aly|Avenue|Ave|Av|Bayou|Beach|Bend|Bluffs?|Bottom|Boulevard|Blvd|Branch|Bridge|Brooks?|Burgs?|Bypass|Camp|"
    "Canyon|Cape|Causeway|Centers?|Circles?|Cir|Cliffs?|Close|Club|Common|Corners?|Course|Courts?|Ct|Coves?|Creek|"
    "Crescent|Cres|Crest|Crossing|"
    "Crossroad|Curve|Dale|Dam|Divide|Drives?|Dr|Estates?|Expressway|Extensions?|Falls?|Ferry|Fields?|Flats?|Fords?|"
    "Forest|Forges?|Forks?|Fort|Freeway|"
    "Gardens?|Gdns|Gateway|Glens?|Greens?|Groves?|Harbors?|Havens?|Heights|Highway|Hwy|Hills?|Hollow|Inlet|Islands?|"
    "Isle|Junctions?|Keys?|Knolls?|Lakes?|"
    "Land|Landing|Lane|Ln|Lights?|Loaf|Locks?|Lodge|Loop|Mall|Manors?|Meadows?|Mews|Mills?|Mission|Motorway|Mount|"
    "Mountains?|Neck|Orchard|Oval|Overpass|Parks?|"
    "Parkways?|Pkwy|Pass|Passage|Path|Pike|Pines?|Place|Pl|Plains?|Plaza|Points?|Ports?|Prairie|Radial|Ramp|Ranch|"
    "Rapids?|Rest|Ridges?|River|Roads?|Rd|"
    "Route|Row|Rue|Run|Shoals?|Shores?|Skyway|Springs?|Spurs?|Squares?|Sq|Stations?|Stravenue|Stream|Streets?|St|"
    "Summit|Terrace|Ter|Throughway|Trace|"
    "Track|Trail|Trafficway|Tunnel|Turnpike|Underpass|Unions?|Valleys?|Viaduct|Views?|Villages?|Ville|Vista|Walks?|"
    "Wall|Ways?|Wells?|Hollow"
)
SUFFIX = "(?:" + "|".join(f"{word}|{word.lower()}|{word.upper()}" for word in (SUFFIXES,)) + ")"
COMMON = (
    r"(?:street|st|avenue|ave|road|rd|lane|ln|drive|dr|boulevard|blvd|court|ct|place|way|close|terrace|crescent|"
    r"highway|hwy|parkway|pkwy|square)"
)
UNIT = (
    r"(?:,?[ \t]*\n?[ \t]*(?i:apt|apartment|suite|ste|unit|flat|fl|floor|room|rm|studio|bldg|building|lot|no|box|"
    r"dept)(?:\.?[ \t]{0,2}#?[ \t]?(?=[0-9])|\.?[ \t]#?)[0-9A-Za-z]{1,6}(?:-[0-9]{1,4})?(?![\w])|"
    r",?[ \t]?\#[ \t]?[0-9A-Za-z]{1,6})?"
)
ENGLISH = re.compile(
    rf"[0-9](?<![\w.,/\-][0-9])[0-9]{{0,5}}[A-Za-z]?(?:[-/][0-9]{{1,4}}[A-Za-z]?)?,?[ \t]+(?:[NSEW]{{1,2}}\.?[ \t]+|"
    rf"(?:North|South|East|West)[ \t]+)?(?:{STREET_WORD}[ \t]+){{1,4}}?{SUFFIX}\b(?:\.(?=[ \t,\n]))?(?:[ \t]+(?:NE|NW|"
    rf"SE|SW|[NSEW])\b\.?)?{UNIT}"
)
NAMED_UNIT = re.compile(
    rf"(?<![\w])(?:Flat|Studio|Apartment|"
    rf"Unit)[ \t][0-9]{{1,4}}[A-Za-z]?,?[ \t]?\n?[ \t]?(?:{CAP}[ \t]+){{1,3}}?{SUFFIX}\b"
)
LOWER_ENGLISH = re.compile(
    rf"[0-9](?<![\w.,/\-][0-9])[0-9]{{0,5}}[a-z]?[ \t]+"
    rf"(?:[nsew]\.?[ \t]+)?(?:[a-z0-9'\-]{{2,20}}[ \t]+){{1,3}}?{COMMON}(?![a-z])(?:,?[ \t]*(?:apt|suite|ste|unit|"
    rf"flat)\.?[ \t]?#?[0-9a-z]{{1,6}})?"
)
ADDRESS_LABEL = re.compile(
    r"(?<![a-z])(?:address(?:es)?|addr|resid\w{1,4}|lives? (?:at|in|on)|living at|street|home|"
    r"mailing|ship(?:ped|ping)? to|deliver(?:ed|y)?(?: to)?|moved to|billing|located at)[^0-9]{0,24}$"
)

NUMBER = r"[0-9]{1,4}[ \t]?(?:[a-zA-Z](?![\w]))?(?:[ \t]?[/\-][ \t]?[0-9]{1,4}[a-z]?)?"
GERMAN_WORDS = r"(?:[A-ZÄÖÜ][\wäöüß.\-]{0,30}[ \t](?:(?:van|von|der|den|de|zu|vom)[ \t]){0,2}){0,3}?"
GERMAN_END = (
    r"(?:stra(?:ß|ss)e|STRA(?:ẞ|SS|ß)E|str\.|str(?=[ \t])|weg|gasse|allee|platz|ufer|damm|chaussee|steig|pfad|stieg|"
    r"graben|promenade|brücke|zeile|höhe)"
)
GERMAN = re.compile(
    rf"(?<![\w\-]){GERMAN_WORDS}(?:[A-ZÄÖÜ][\wäöüß\-.]{{0,40}}?{GERMAN_END}|"
    rf"[A-ZÄÖÜ][\wäöüß\-.]{{0,40}}[ \t\-](?:Stra(?:ß|ss)e|Str\.|Weg|Gasse|Allee|Platz|Ring|Ufer|Damm|Chaussee|Steig|"
    rf"WEG|GASSE|ALLEE|PLATZ|RING))[ \t]*(?:Nr\.[ \t]?)?{NUMBER}(?![\w.,]?[0-9])"
)
GERMAN_WITH_TOWN = re.compile(  # endings that other words share ("Spring 24", "Capital 3") count before a postcode only
    rf"(?<![\w\-]){GERMAN_WORDS}[A-ZÄÖÜ][\wäöüß\-.]{{0,40}}?(?:ring|markt|berg|wall|hof|garten|winkel|kamp|feld|tal)"
    rf"[ \t]*{NUMBER}(?=[ \t]*[,;\n]\s{{0,3}}(?:D-)?[0-9]{{5}}[ \t])"
)
GERMAN_PREPOSITION = re.compile(
    rf"(?<![\w])(?:Am|An der|An den|Im|In der|In den|Auf der|Auf dem|Zum|Zur|Unter den|Unter der|Hinter der|Beim|Vor "
    rf"dem)[ \t](?:[A-ZÄÖÜ][\wäöüß\-]{{2,30}}[ \t]){{1,2}}{NUMBER}(?=[ \t]*[,\n;]|[ \t]+(?:in[ \t])?D?-?[0-9]{{5}}|$)"
)
PARTICLE = r"(?:de|du|des|la|le|les|l['\u2019]|d['\u2019]|et|en|au|aux|sur|sous|del|los|las|el|y|von|van|der)"
FRENCH = re.compile(
    r"[0-9](?<![\w.,/\-][0-9])[0-9]{0,3}(?:[ \t]?(?:bis|ter|quater|[A-D])(?![\w]))?,?[ \t]+(?i:rue|avenue|av\.?|"
    r"ave\.?|boulevard|bd\.?|bld\.?|blvd\.?|place|pl\.?|chemin|che\.?|allée|allee|all\.?|impasse|imp\.?|quai|route|"
    r"rte\.?|cours|square|passage|sentier|villa|faubourg|fbg\.?|résidence|lotissement|ruelle|esplanade|promenade|"
    r"montée|voie|hameau|cité)"
    rf"[ \t]+(?:{PARTICLE}(?:[ \t]+|(?<=['\u2019]))){{0,3}}{CAP}(?:[ \t\-]+(?:{PARTICLE}(?:[ \t]+|"
    rf"(?<=['\u2019]))){{0,3}}[A-ZÀ-ÖØ-Ý][\w'\u2019\-]{{0,30}}){{0,5}}"
)
FRENCH_UNNUMBERED = re.compile(
    rf"(?<![\w])(?:rue|avenue|boulevard|chemin|place|impasse|allée|quai)[ \t]+(?:{PARTICLE}(?:[ \t]+|"
    rf"(?<=['\u2019]))){{0,3}}[A-ZÀ-ÖØ-Ý][\w'\u2019\-]{{0,30}}(?:[ \t\-]+(?:{PARTICLE}(?:[ \t]+|"
    rf"(?<=['\u2019]))){{0,3}}[A-ZÀ-ÖØ-Ý][\w'\u2019\-]{{0,30}}){{0,5}}(?=[ \t]*[,\n][ \t]*[0-9]{{5}}[ \t])"
)
SPANISH = re.compile(
    r"(?<![\w])(?i:calle|c/|c\.|cl\.|avenida|avda\.?|avd\.?|av\.|plaza|pza\.?|plza\.?|paseo|pso\.?|p\.º|camino|cam\.|"
    r"carretera|ctra\.?|ronda|rda\.?|traves[ií]a|callej[oó]n|cuesta|glorieta|rambla|pasaje|psje\.?|v[ií]a|vial|"
    r"alameda|cañada|urbanizaci[oó]n|urb\.|acceso|pasadizo|pol[ií]gono|costanilla|corredera)"
    rf"[ \t]*(?:{PARTICLE}[ \t]+){{0,3}}{CAP}(?:[ \t\-]+"
    rf"(?:{PARTICLE}[ \t]+){{0,3}}[A-ZÀ-ÖØ-Ý][\w'\u2019\-]{{0,30}}){{0,6}},?[ \t]*(?:(?:n[º°.]?[ \t]?|núm\.?[ \t]?|"
    rf"número[ \t])?[0-9]{{1,4}}(?:[ \t]?(?:bis|[A-Z])(?![\w]))?|s/n)"
    r"(?:,?[ \t]*(?i:piso|puerta|pta\.?|apt\.?|esc\.?|escalera|portal|bloque|bajo|entresuelo|[aá]tico|izquierda|"
    r"izda?\.?|dcha?\.?|derecha|[0-9]{1,2}[ºª°](?:[ \t]?[A-D](?![\w]))?)(?:[ \t]?[0-9]{1,3}[ºª°]?)?){0,3}"
)
BOX = re.compile(
    r"(?<![\w])(?i:p\.?[ ]?o\.?[ ]?box|post office box|postfach|boîte postale|apartado(?: de correos)?|apdo\.?|"
    r"pmb)[ \t]{1,2}(?:n[º°][ ]?)?[0-9](?:[0-9 ]{0,8}[0-9])?(?![\w])|"
    r"(?<![\w])B\.?P\.?[ \t]{1,2}[0-9]{2,5}(?![\w/])(?=,?\s{1,3}[0-9]{5}[ ])|(?<![\w])(?:PSC|Unit|CMR) [0-9]{1,5},? "
    r"Box [0-9]{1,5}(?![\w])"
)  # fmt: skip

CITY = (
    r"[A-ZÀ-ÖØ-Ý][\w'\u2019]{1,30}(?:(?:[ \t]|-)(?:(?:de|du|la|le|les|sur|sous|en|an|am|der|den|dem|im|in|bei|ob|"
    r"vor|vorm|vom|zum|zur|del|los|las|lès|d['\u2019]|l['\u2019])(?:[ \t\-]|"
    r"(?<=['\u2019])))*(?:[A-ZÀ-ÖØ-Ý(][\w'\u2019]{1,30}\)?)){0,4}"
)
EUROPEAN = re.compile(rf"[0-9](?<![\w.,/][0-9])[0-9]{{4}}(?:[ \t]|,[ \t]){CITY}")
COUNTRY_BEFORE = re.compile(r"(?<![\w])(?:D|F|E|DE|FR|ES)[\- ]$")
STREET_BEFORE = re.compile(  # what may stand between a street and its town: the end of a number, a storey, a line's end
    r"(?:[0-9](?:[ \t]?[a-zA-Z])?|s/n|[A-ZÀ-ÖØ-Ý][\w'\u2019\-]{1,30}|(?:piso|puerta|pta|esc|portal|bajo|"
    r"[0-9][ºª°])[ \w.ºª]{0,8}|[ºª.])[ \t]?[,\n;]\s{0,3}(?:[\w .\-]{1,30}[,\n]\s{0,3})?$",
    re.IGNORECASE,
)
BRITISH_HINT = re.compile(r" [0-9][A-Z]{2}(?![A-Za-z0-9])")
GERMAN_HINT = re.compile(
    r"(?:r[a]?s?s?e|r\.?|weg|gasse|allee|platz|ing|ufer|damm|chaussee|ei[gl]e?|pfad|stieg|graben|"
    r"markt|berg|wall|promenade|hof|garten|winkel|brucke|kamp|feld|hohe|tal)[ \t]{0,2}(?:nr\. ?)?[0-9]"
)
LOWER_HINT = re.compile(rf" {COMMON}(?![a-z])")
BRITISH = re.compile(
    r"(?<![A-Za-z0-9])(?:GIR ?0AA|[A-PR-UWYZ](?:[0-9]{1,2}|[A-HK-Y][0-9]{1,2}|[0-9][A-HJKPS-UW]|"
    r"[A-HK-Y][0-9][ABEHMNPRV-Y]) [0-9][ABD-HJLNP-UW-Z]{2})(?![A-Za-z0-9])"
)
STATES = (
    "AL|AK|AZ|AR|CA|CO|CT|DE|DC|FL|GA|HI|ID|IL|IN|IA|KS|KY|LA|ME|MD|MA|MI|MN|MS|MO|MT|NE|NV|NH|NJ|NM|NY|NC|ND|OH|OK|"
    "OR|PA|RI|SC|SD|TN|TX|UT|VT|VA|WA|WV|WI|WY|PR|VI|GU|AS|MP|FM|MH|PW|AP|AE|AA"
)
STATE_NAMES = (
    "Alabama|Alaska|Arizona|Arkansas|California|Colorado|Connecticut|Delaware|Florida|Georgia|Hawaii|Idaho|Illinois|"
    "Indiana|Iowa|Kansas|Kentucky|Louisiana|Maine|Maryland|Massachusetts|Michigan|Minnesota|Mississippi|Missouri|"
    "Montana|Nebraska|Nevada|New Hampshire|New Jersey|"
    "New Mexico|New York|North Carolina|North Dakota|Ohio|Oklahoma|Oregon|Pennsylvania|Rhode Island|South Carolina|"
    "South Dakota|Tennessee|Texas|Utah|"
    "Vermont|Virginia|Washington|West Virginia|Wisconsin|Wyoming"
)
ZIP = re.compile(r"[0-9](?<![\w][0-9])[0-9]{4}(?:-[0-9]{4})?(?![\w]|-[0-9])")
STATE_BEFORE = re.compile(rf"(?<![\w])(?:{STATES}|{STATE_NAMES}),?[ \t]{{1,3}}$")
SPANISH_WORDS = (
    "calle", "c", "cl", "avenida", "avda", "avd", "av", "plaza", "pza", "plza", "paseo", "pso", "p", "camino", "cam",
    "carretera", "ctra", "ronda", "rda", "travesia",
    "callejon", "cuesta", "glorieta", "rambla", "pasaje", "psje", "via", "vial", "alameda", "canada", "urbanizacion",
    "urb", "acceso", "pasadizo", "poligono",
    "costanilla", "corredera",
)  # fmt: skip
TITLE_CASE = r"(?:Mc|Mac|O'|La|De)?[A-Z][a-z'.\-]{1,24}(?:-[A-Z][a-z]{1,20})?"
CITY_STATE = re.compile(rf"(?<![\w])((?:{TITLE_CASE}[ \t]){{0,2}}{TITLE_CASE}),[ \t](?:{STATES}|{STATE_NAMES})(?![\w])")
CITY_HINT = re.compile(rf", (?:{STATES}|[A-Z][a-z]{{3,12}})(?![\w])")
CITY_BEFORE = re.compile(rf"(?<=[\n,])[ \t]?({CITY})[,\n \t]{{1,2}}$")
AREA = re.compile(
    r"(?:plz|postleitzahl|cp|code postal|codigo postal|c\.p\.|adres\w{0,5}|anschrift|adress\w{0,3}|direccion|"
    r"domicil\w{0,3}|wohnhaft|wohnt|habite|reside\w{0,4}|vive|sitz|ort|ville|ciudad|localidad|stadt|localite|lieu|"
    r"municipio|poblacion|residant|demeurant|vecin[oa])"
)


class Streets:
    """Streets whose number comes first, German ones, and then the postcodes and towns near a street or a label."""

    entity = "ADDRESS"

    def find(self, document: Document) -> Iterator[Span]:
        if document.has_digit:
            yield from self._streets(document)
            yield from self._british_towns(document)
            yield from self._european_towns(document)

    def _streets(self, document: Document) -> Iterator[Span]:
        for match in ENGLISH.finditer(document.text):
            yield Span(*match.span(), self.entity, 0.85)
        for match in FRENCH.finditer(document.text):
            yield Span(*match.span(), self.entity, 0.84)
        if GERMAN_HINT.search(document.folded) is not None:
            for pattern in (GERMAN, GERMAN_WITH_TOWN):
                for match in pattern.finditer(document.text):
                    yield Span(*match.span(), self.entity, 0.84)
        if LOWER_HINT.search(document.folded) is not None:
            for match in LOWER_ENGLISH.finditer(document.folded):
                if ADDRESS_LABEL.search(document.before(match.start(), 40)):
                    yield Span(*match.span(), self.entity, 0.7)

    def _british_towns(self, document: Document) -> Iterator[Span]:
        if BRITISH_HINT.search(document.text) is None:
            return
        for match in BRITISH.finditer(document.text):
            yield Span(*match.span(), self.entity, 0.86)
            start = max(0, match.start() - 60)
            city = CITY_BEFORE.search(document.text[start : match.start()])
            if city is not None:
                yield Span(start + city.start(1), start + city.end(1), "LOCATION", 0.7)

    def _european_towns(self, document: Document) -> Iterator[Span]:
        for match in EUROPEAN.finditer(document.text):
            start = match.start()
            country = COUNTRY_BEFORE.search(document.text[max(0, start - 4) : start])
            if country is not None:
                yield Span(start - len(country.group()), match.end(), self.entity, 0.82)
            elif AREA.search(document.before(start, 40)) or self._street_before(document, start):
                yield Span(start, match.end(), self.entity, 0.82)

    def _street_before(self, document: Document, start: int) -> bool:
        return STREET_BEFORE.search(document.text[max(0, start - 60) : start]) is not None


class Cities:
    """ "Springfield, IL": the city, the state left."""

    entity = "LOCATION"

    def find(self, document: Document) -> Iterator[Span]:
        if CITY_HINT.search(document.text) is None:
            return
        for match in CITY_STATE.finditer(document.text):
            yield Span(*match.span(1), self.entity, 0.7)


def _state_before(document: Document, start: int) -> bool:
    return STATE_BEFORE.search(document.text[max(0, start - 24) : start]) is not None


class Zips:
    """Five or nine digits after a state."""

    entity = "ZIP"

    def find(self, document: Document) -> Iterator[Span]:
        if document.has_digit:
            for match in ZIP.finditer(document.text):
                if _state_before(document, match.start()):
                    yield Span(*match.span(), self.entity, 0.88)


RECOGNIZERS = (Streets(), Cities(), Zips())
BY_WORD = (
    Anchored("ADDRESS", ("flat", "studio", "apartment", "unit", "suite", "apt"), NAMED_UNIT, 0.86),
    Anchored("ADDRESS", ("am", "an", "im", "in", "auf", "zum", "zur", "unter", "hinter", "beim", "vor"),
        GERMAN_PREPOSITION, 0.75),
    Anchored("ADDRESS", ("rue", "avenue", "boulevard", "chemin", "place", "impasse", "allee", "quai"),
        FRENCH_UNNUMBERED, 0.84),
    Anchored("ADDRESS", SPANISH_WORDS, SPANISH, 0.84),
    Anchored("ADDRESS", ("p", "po", "post", "postfach", "b", "bp", "boite", "apartado", "apdo", "pmb", "psc", "unit",
        "cmr"), BOX, 0.9),
    Labelled("ZIP", ("zip", "zip code", "zipcode", "postal code", "zip+4"), r"[0-9]{5}(?:-[0-9]{4})?", 0.87, gap=NEAR),
    Labelled("ADDRESS", ("plz", "postleitzahl", "code postal", "cp", "código postal", "c.p.", "postal code",
        "postcode"), r"[0-9]{5}|[a-z]{1,2}[0-9][a-z0-9]? ?[0-9][a-z]{2}", 0.84),
)  # fmt: skip
