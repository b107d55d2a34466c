"""Chemical reactions of our own making, as SMILES: what notebook 03 asks a published reaction classifier about.

Fifteen kinds that every textbook has, each a pattern in which two groups are put: ``{a}`` an aromatic one, ``{b}``
another. They are right as graphs, and nobody has cooked them.

Source: the notation is Weininger (1988), SMILES, J. Chem. Inf. Comput. Sci. 28, 31-36.
"""
import random

RINGS = ("c1ccccc1", "c1ccc(F)cc1", "c1ccc(OC)cc1", "c1cccc(Cl)c1", "c1ccc(C#N)cc1", "c1ccncc1", "c1cccs1",
         "c1ccc(C(F)(F)F)cc1", "c1ccc(C)cc1", "c1cc(OC)cc(OC)c1", "c1ccco1", "c1ccc(C(C)C)cc1")
CHAINS = ("C1CCCCC1", "CCCC", "CC(C)C", "C1CCCC1", "CCOC", "Cc1ccccc1", "CC1CCOCC1", "CCc1ccncc1", "CC1CC1", "CCCCC")
KINDS = {
    "amide": "O=C(O){a}.N{b}>>O=C(N{b}){a}",
    "ester": "O=C(O){a}.O{b}>>O=C(O{b}){a}",
    "hydrolysis": "COC(=O){a}>>O=C(O){a}",
    "Boc on": "CC(C)(C)OC(=O)OC(=O)OC(C)(C)C.N{b}>>CC(C)(C)OC(=O)N{b}",
    "Boc off": "CC(C)(C)OC(=O)N{b}>>N{b}",
    "nitro reduction": "O=[N+]([O-]){a}>>N{a}",
    "reductive amination": "N{b}.O=C{a}>>C(N{b}){a}",
    "sulfonamide": "N{b}.O=S(=O)(Cl){a}>>O=S(=O)(N{b}){a}",
    "urea": "N{b}.O=C=N{a}>>O=C(N{b})N{a}",
    "ether": "BrC{b}.O{a}>>C({b})O{a}",
    "oxidation": "OC{a}>>O=C{a}",
    "ketone reduction": "CC(=O){a}>>CC(O){a}",
    "bromide": "OC{a}>>BrC{a}",
    "acid chloride": "O=C(O){a}>>O=C(Cl){a}",
    "Suzuki": "OB(O)c1ccc(C)cc1.Br{a}>>Cc1ccc(cc1)-{a}",
}


def reactions(n: int = 300, seed: int = 0) -> list[tuple[str, str]]:
    """This many different pairs of kind and SMILES, the kinds in turn.

    Raises:
        ValueError: more than there are.

    >>> reactions(1)
    [('amide', 'O=C(O)c1ccco1.NCC1CC1>>O=C(NCC1CC1)c1ccco1')]
    """
    draw, found = random.Random(seed), {}
    every = {kind: draw.sample(those, len(those)) for kind in KINDS for those in [_all_of(kind)]}
    for i in range(max(map(len, every.values()))):
        found |= {smiles[i]: kind for kind, smiles in every.items() if i < len(smiles)}
    if len(found) < n:
        raise ValueError(f"n={n}: there are {len(found)} reactions.")
    return [(kind, smiles) for smiles, kind in list(found.items())[:n]]


def _all_of(kind: str) -> list[str]:
    pattern = KINDS[kind]
    return [pattern.format(a=a, b=b) for a in (RINGS if "{a}" in pattern else [""])
            for b in (CHAINS if "{b}" in pattern else [""])]
