"""Words that the generated tasks are made of: short and common, so that tokenizers take few tokens for them."""


def _listed(text: str) -> list[str]:
    return text.split()


WORDS = _listed(
    """
    apple bridge candle desert engine forest garden hammer island jacket kitchen ladder market needle ocean pencil
    quarry river silver table umbrella valley window yellow anchor basket castle dragon eagle feather guitar
    harbor insect jungle kettle lemon mirror nest orange pepper rabbit saddle temple violin whale barrel camera
    donkey elbow fossil glove honey ivory jewel lantern marble nickel oyster pillow ribbon spider ticket tunnel
    velvet wagon
    """
)
FIRST_NAMES = _listed(
    """
    Alice Bruno Clara David Elena Frank Grace Henry Irene Jack Karen Louis Maria Nathan Olivia Peter Rachel Simon
    Teresa Victor Walter Yvonne
    """
)
LAST_NAMES = _listed(
    """
    Adams Brown Carter Dawson Edwards Fisher Graham Hughes Jensen Keller Larson Miller Norton Parker Quinn Russell
    Stewart Turner Vaughn Watson Young Zimmer
    """
)
CITIES = _listed(
    """
    Amsterdam Athens Barcelona Berlin Boston Brussels Budapest Chicago Copenhagen Dublin Edinburgh Florence Geneva
    Hamburg Helsinki Istanbul Lisbon London Madrid Milan Montreal Moscow Munich Oslo Paris Prague Rome Seattle
    Tokyo Toronto Vienna Warsaw
    """
)
JOBS = _listed(
    """
    baker carpenter dentist doctor farmer gardener lawyer nurse painter pilot plumber singer tailor teacher
    """
)
