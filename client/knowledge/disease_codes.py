"""Which ICD codes stand for the diseases of PharmacotherapyDB: a table of our own.

A disease covers the codes listed and everything below them. Whole categories are named only
where every code below means the disease; where a category holds several diseases, the codes are
named one by one, and a disease without codes of its own is left out.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

__all__ = ["DISEASE_CODES"]

_TYPE_2: Final = " ".join(f"250.{n}0 250.{n}2" for n in range(10))
_TYPE_1: Final = " ".join(f"250.{n}1 250.{n}3" for n in range(10))

DISEASE_CODES: Final = MappingProxyType(
    {
        # DOID: (ICD-9 codes and ranges of categories, ICD-10 codes and ranges of categories)
        "DOID:10652": ("331.0", "G30"),  # Alzheimer's disease
        "DOID:9206": ("530.85", "K22.7"),  # Barrett's esophagus
        "DOID:8778": ("555", "K50"),  # Crohn's disease
        "DOID:11119": ("307.23", "F95.2"),  # Gilles de la Tourette syndrome
        "DOID:12361": ("242.0", "E05.0"),  # Graves' disease
        "DOID:13378": ("446.1", "M30.3"),  # Kawasaki disease
        "DOID:5408": ("731.0", "M88"),  # Paget's disease of bone
        "DOID:14330": ("332.0", "G20"),  # Parkinson's disease
        "DOID:635": ("042", "B20-B24"),  # acquired immunodeficiency syndrome
        "DOID:0050741": ("303", "F10.2"),  # alcohol dependence
        "DOID:4481": ("477", "J30.1 J30.2 J30.5 J30.8 J30.9"),  # allergic rhinitis
        "DOID:986": ("704.01", "L63"),  # alopecia areata
        "DOID:332": ("335.20", "G12.21"),  # amyotrophic lateral sclerosis
        "DOID:2355": ("280-285", "D50-D64"),  # anemia
        "DOID:7147": ("720.0", "M45"),  # ankylosing spondylitis
        "DOID:2841": ("493.0 493.1 493.8 493.9", "J45"),  # asthma
        "DOID:1936": ("440", "I70"),  # atherosclerosis
        "DOID:3310": ("691.8", "L20"),  # atopic dermatitis
        "DOID:1094": ("314", "F90"),  # attention deficit hyperactivity disorder
        "DOID:12849": ("299.0", "F84.0"),  # autistic disorder
        "DOID:14227": ("606.0", "N46.0"),  # azoospermia
        "DOID:3312": ("296.0 296.4 296.5 296.6 296.7 296.8", "F31"),  # bipolar disorder
        "DOID:184": ("170", "C40-C41"),  # bone cancer
        "DOID:1319": ("191", "C71"),  # brain cancer
        "DOID:1612": ("174-175", "C50"),  # breast cancer
        "DOID:4362": ("180", "C53"),  # cervical cancer
        "DOID:784": ("585", "N18"),  # chronic kidney failure
        "DOID:3083": ("491.2 492 493.2 496", "J43-J44"),  # chronic obstructive pulmonary disease
        "DOID:219": ("153", "C18"),  # colon cancer
        "DOID:12995": ("312.8 312.9", "F91"),  # conduct disorder
        "DOID:3393": ("410-414", "I20-I25"),  # coronary artery disease
        "DOID:216": ("521.0", "K02"),  # dental caries
        "DOID:12930": ("", "I42.0"),  # dilated cardiomyopathy (ICD-9 has no code of its own)
        "DOID:1595": ("296.2 296.3", "F32-F33"),  # endogenous depression
        "DOID:1826": ("345", "G40"),  # epilepsy syndrome
        "DOID:5041": ("150", "C15"),  # esophageal cancer
        "DOID:1312": ("582.1", "N04.1"),  # focal segmental glomerulosclerosis
        "DOID:11714": ("648.8", "O24.4"),  # gestational diabetes
        "DOID:1686": ("365", "H40-H42"),  # glaucoma
        "DOID:13189": ("274", "M10"),  # gout
        "DOID:11934": ("140-149 161", "C00-C14 C32"),  # head and neck cancer
        "DOID:2531": ("200-208", "C81-C96"),  # hematologic cancer
        "DOID:2043": ("070.2 070.3", "B16 B18.0 B18.1 B19.1"),  # hepatitis B
        "DOID:10763": ("401-405", "I10-I15"),  # hypertension
        "DOID:1459": ("243-244", "E02-E03"),  # hypothyroidism
        "DOID:0050156": ("516.31", "J84.112"),  # idiopathic pulmonary fibrosis
        "DOID:263": ("189.0", "C64"),  # kidney cancer
        "DOID:1024": ("030", "A30"),  # leprosy
        "DOID:3571": ("155", "C22"),  # liver cancer
        "DOID:1324": ("162.2 162.3 162.4 162.5 162.8 162.9", "C34"),  # lung cancer
        "DOID:0060073": ("200-202", "C81-C85 C88"),  # lymphatic system cancer
        "DOID:12365": ("084", "B50-B54"),  # malaria
        "DOID:1909": ("172", "C43"),  # melanoma
        "DOID:3565": ("225.2 225.4", "D32"),  # meningioma
        "DOID:14221": ("277.7", "E88.81"),  # metabolic syndrome X
        "DOID:6364": ("346", "G43"),  # migraine
        "DOID:2377": ("340", "G35"),  # multiple sclerosis
        "DOID:8986": ("347", "G47.4"),  # narcolepsy
        "DOID:585": ("592.0", "N20.0"),  # nephrolithiasis
        "DOID:0050742": ("305.1", "F17"),  # nicotine dependence
        "DOID:9970": ("278.0", "E66"),  # obesity
        "DOID:2174": ("190", "C69"),  # ocular cancer
        "DOID:8398": ("715", "M15-M19"),  # osteoarthritis
        "DOID:11476": ("733.0", "M80-M81"),  # osteoporosis
        "DOID:2394": ("183.0", "C56"),  # ovarian cancer
        "DOID:1793": ("157", "C25"),  # pancreatic cancer
        "DOID:4989": ("577.0 577.1", "K85 K86.0 K86.1"),  # pancreatitis
        "DOID:594": ("300.01", "F41.0"),  # panic disorder
        "DOID:824": ("523.3 523.4", "K05.2 K05.3"),  # periodontitis
        "DOID:11612": ("256.4", "E28.2"),  # polycystic ovary syndrome
        "DOID:12236": ("571.6", "K74.3"),  # primary biliary cirrhosis
        "DOID:10283": ("185", "C61"),  # prostate cancer
        "DOID:8893": ("696.1", "L40.0 L40.1 L40.4 L40.8 L40.9"),  # psoriasis
        "DOID:9008": ("696.0", "L40.5"),  # psoriatic arthritis
        "DOID:9835": ("367", "H52"),  # refractive error
        "DOID:0050425": ("333.94", "G25.81"),  # restless legs syndrome
        "DOID:7148": ("714.0", "M05-M06"),  # rheumatoid arthritis
        "DOID:5419": ("295", "F20"),  # schizophrenia
        "DOID:14268": ("", "K83.01"),  # sclerosing cholangitis
        "DOID:4159": ("172-173", "C43-C44"),  # skin cancer
        "DOID:10534": ("151", "C16"),  # stomach cancer
        "DOID:9074": ("710.0", "M32"),  # systemic lupus erythematosus
        "DOID:418": ("710.1", "M34"),  # systemic scleroderma
        "DOID:2998": ("186", "C62"),  # testicular cancer
        "DOID:3277": ("164.0", "C37"),  # thymus cancer
        "DOID:1781": ("193", "C73"),  # thyroid cancer
        "DOID:9744": (_TYPE_1, "E10"),  # type 1 diabetes mellitus
        "DOID:9352": (_TYPE_2, "E11"),  # type 2 diabetes mellitus
        "DOID:8577": ("556", "K51"),  # ulcerative colitis
        "DOID:11054": ("188", "C67"),  # urinary bladder cancer
        "DOID:363": ("179 182", "C54-C55"),  # uterine cancer
        "DOID:12306": ("709.01", "L80"),  # vitiligo
    }
)
