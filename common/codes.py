"""Every error code, once: label, meaning and remedy. docs/ERRORS.md is generated from this.

Labels are stable: a code may be retired but its label is never given to something else.
Blocks: 10xx configuration, 20xx data, 21xx models and tasks, 30xx privacy and ledger,
31xx approval and ceilings, 32xx enrolment, 40xx cryptography and encoding, 41xx handshake, 42xx rounds,
50xx aborted rounds and runs, 60xx storage, 70xx command line and output.
"""

from __future__ import annotations

from enum import Enum


class Code(Enum):
    """A stable error code: `label`, `meaning` (one sentence) and default `remedy`."""

    # ---- 10xx configuration
    CONFIG_SYNTAX = ("WR-1001", "The file is not well-formed YAML.", "Fix the line named.")
    CONFIG_UNREADABLE = (
        "WR-1002",
        "The configuration file cannot be read.",
        (
            "Check the path and its permissions; a configuration is a UTF-8 text file of at most "
            "256 KiB."
        ),
    )
    CONFIG_FORBIDDEN = (
        "WR-1003",
        (
            "The file uses a part of YAML that can hide what it says: a duplicate key, an anchor, "
            "an alias, a tag, a directive or very deep nesting."
        ),
        "Write each value once, in plain mappings, lists, text and numbers.",
    )
    CONFIG_INVALID = (
        "WR-1004",
        "A key is unknown or missing, or a value is outside what the key allows.",
        "Correct every line named; docs and configs/ show each key with its meaning.",
    )
    CONFIG_FORMAT = (
        "WR-1005",
        "The file is of another kind than the one asked for, or of a version not known here.",
        (
            "Start the file with the line `format: wardround-study/1`, `format: wardround-site/1` "
            "or `format: wardround-coordinator/1`, and give it to the command that reads that kind."
        ),
    )
    ROSTER_INVALID = (
        "WR-1010",
        "The roster is not a list of distinct sites with distinct Ed25519 public keys.",
        "Ask the consortium for the roster file again and compare its digest out of band.",
    )
    ROSTER_SIGNATURE = (
        "WR-1011",
        "The roster's signature does not verify under the pinned key.",
        "Do not use the file; compare the signing key and the roster's digest out of band.",
    )
    ROSTER_ROLLBACK = (
        "WR-1012",
        "The roster is older than the one already in use.",
        "Use the newest roster of the consortium; an older version may list a removed key.",
    )
    NO_SIMULATION = (
        "WR-1090",
        "The study does not describe a simulation.",
        "Add a section `simulation` with `data` and `split`; see configs/simulation.yaml.",
    )
    # ---- 20xx data
    DATA_DECLINED = (
        "WR-2090",
        "A hospital sits a round out because of its own records or machine.",
        "Read that hospital's own audit log: why is nobody else's business.",
    )
    DATA_UNREADABLE = (
        "WR-2001",
        "A data file is missing, unreadable or damaged.",
        "Check the path, the permissions and that the file was copied whole.",
    )
    DATA_FORMAT = (
        "WR-2002",
        "The data file is of a kind that is not read here, or breaks its own format.",
        "Give .csv, .csv.gz, .parquet, .ndjson, .ndjson.gz, .jsonl or .jsonl.gz, well-formed.",
    )
    DATA_EMPTY = (
        "WR-2003",
        "The data file holds no record.",
        "Export it again; the first line names the columns and at least one record follows.",
    )
    DATA_ENCODING = (
        "WR-2004",
        "The data file is not UTF-8 text.",
        "Convert it, for example with `iconv -f latin1 -t utf-8 OLD > NEW`.",
    )
    DATA_COLUMNS = (
        "WR-2005",
        "A column that the study names is not in the data file.",
        "Rename the column in the file, or name it under task.columns in the study.",
    )
    DATA_RAGGED = (
        "WR-2006",
        "A record has more or fewer fields than the header.",
        "Look for an unquoted comma or line break in the record named.",
    )
    DATA_TOO_LONG = (
        "WR-2007",
        "A line or a field is longer than the reader accepts (4 MiB).",
        "Look for a missing quote or line break; split or remove the record.",
    )
    DATA_VALUE = (
        "WR-2008",
        "A field is empty, not a finite number, or not of a kind that fits its column.",
        "Correct or remove the record named.",
    )
    DATA_LABEL = (
        "WR-2009",
        "A record has a label that is not in the study.",
        "Map it to one of task.labels, or remove the record; labels are never taken from data.",
    )
    DATA_OVERLAP = (
        "WR-2010",
        "A patient is in the training files and in the test files.",
        "Move all records of a patient to one side; otherwise the test is not a test.",
    )
    DATA_PATIENT_TWICE = (
        "WR-2011",
        "One patient id occurs at two sites.",
        "Make the ids unique across sites (for example by the site's name in front), or keep a "
        "patient at one site.",
    )
    SITE_TOO_SMALL = (
        "WR-2012",
        "A site has fewer patients than the floor.",
        "Join it with another site, leave it out, or use other split settings.",
    )
    SPLIT_IMPOSSIBLE = (
        "WR-2013",
        "The split asked for cannot be made from this data.",
        "Ask for fewer sites, a larger alpha or more classes per site.",
    )
    SITE_NAME = (
        "WR-2014",
        "A value of the site column cannot name a site.",
        "Use short names of letters, digits and hyphens, distinct without regard to case.",
    )
    # ---- 205x hospitals' systems
    NO_CASES = (
        "WR-2051",
        "The records lie in a hospital's system, and the study does not say what of it is a case.",
        "Ask the consortium for a study with a section `cases`, or give tables with its columns.",
    )
    CASES_EMPTY = (
        "WR-2052",
        "Nothing that the hospital's system holds is a case of this study.",
        "Type `wardround client data check STUDY --config site.yaml`: it counts what is left out, "
        "and why.",
    )
    # ---- 206x knowledge graphs
    GRAPH_CIRCLE = (
        "WR-2061",
        "The knowledge graph says of something that it is a kind of itself.",
        "Remove one of the is_a edges of the circle, or correct its direction.",
    )
    GRAPH_DIFFERS = (
        "WR-2062",
        "The knowledge graph on this machine is not the one that the study names.",
        "Ask the consortium for the study's edge files again; all hospitals must use the same.",
    )
    GRAPH_LICENCE = (
        "WR-2063",
        "An edge stands under a licence that does not allow to hand it on.",
        "Leave that source out, or let every hospital obtain it under its own licence.",
    )
    GRAPH_ABSENT = (
        "WR-2064",
        "The study names a knowledge graph that is not on this machine.",
        "Put the study's edge files into the folder `knowledge` of site.yaml; in a simulation they "
        "are looked for beside the study.",
    )
    # ---- 207x images
    IMAGE_KIND = (
        "WR-2071",
        "An image is of a kind that is not read, too large, or not what the study declares.",
        "Give 8-bit gray or RGB PNG or JPEG with one picture, or DICOM with one frame, as task.channels says.",
    )
    IMAGE_PATH = (
        "WR-2072",
        "An image's path leaves the table's folder, or is a link.",
        "Copy the images into the table's folder (or below it) and name them relative to it.",
    )
    IMAGE_TEXT = (
        "WR-2073",
        "A DICOM image says that text is burned into its pixels.",
        "Mask the text and set BurnedInAnnotation to NO, or leave the image out.",
    )
    # ---- 21xx models and tasks
    MODEL_FOLDER = (
        "WR-2101",
        "The backbone is not a model folder, or its package is not installed.",
        "Name a folder with config.json, model.safetensors and a tokenizer, or "
        "package:NAME/FOLDER of an installed package.",
    )
    MODEL_UNREACHABLE = (
        "WR-2102",
        "The backbone is not in the local cache and the model hub cannot be reached.",
        "Copy the model folder to this machine and name the folder instead.",
    )
    MODEL_UNSAFE = (
        "WR-2103",
        "The model folder has no safetensors weights; other formats can run code when loaded.",
        "Convert the weights to model.safetensors on a machine you trust.",
    )
    MODEL_FAMILY = (
        "WR-2104",
        "The model is not an encoder that classifies text.",
        "Choose a BERT-like encoder: bert, distilbert, roberta, electra, mpnet, modernbert.",
    )
    MODEL_LAYERS = (
        "WR-2105",
        "The tuning asked for finds no layer of that name in this model.",
        "Name linear layers of this model under model.lora.modules, or choose another tuning.",
    )
    MODEL_STATE = (
        "WR-2106",
        "The trained tensors do not belong to this study's model.",
        "Use the study and the backbone that the tensors were trained with.",
    )
    MODEL_TOKENS = (
        "WR-2107",
        "The study reads more tokens than the model has positions for.",
        "Lower task.max_tokens, or set task.long_notes to window.",
    )
    PERSONAL_LAYERS = (
        "WR-2111",
        "The study's network does not have the layers that training.personal names, or no others.",
        "Name in training.personal layers that the network has, and leave some for all hospitals.",
    )
    MODEL_OUTPUT = (
        "WR-2108",
        "The model folder or the predictions cannot be written.",
        "Check the free space and the permissions of the output folder; nothing was replaced.",
    )
    TASK_ABSENT = (
        "WR-2080",
        "A task of a package of its own is not installed here, or not whole.",
        "Install the package that offers it (entry point group wardround.tasks), the same version "
        "at every party.",
    )
    OUTPUT_EXISTS = (
        "WR-2109",
        "The output is already there and is not overwritten.",
        "Name another output, or remove the old one.",
    )
    TRAINER_LOST = (
        "WR-2120",
        "The process that trains ended, or gave no answer in time; the hospital sits this round out.",
        "Read trainer.log in the state folder; where memory ran out, lower training.micro_batch or free memory. The next round starts a new one.",
    )
    BACKBONE_DIFFERS = (
        "WR-2121",
        "The backbone on this machine is not the one that the study names.",
        "Install the model folder or package whose digest `wardround client review` shows.",
    )
    # ---- 30xx privacy and ledger
    BUDGET_EXCEEDED = (
        "WR-3001",
        "A round would spend more privacy than this site's cap allows.",
        "Stop here, or agree on more noise or fewer rounds; raising the cap is a decision of the data steward.",
    )
    BUDGET_DELTA = (
        "WR-3002",
        "The ledger was opened with another delta than the one it was founded on.",
        "Use the ledger's own delta; a ledger's delta never changes.",
    )
    BUDGET_CAP = (
        "WR-3003",
        "A cap can only be raised, and only above the present one.",
        "Name a number above the present cap.",
    )
    RESERVATION_BEGUN = (
        "WR-3004",
        "A reservation whose training may have begun cannot be voided.",
        "Nothing: it stays charged.",
    )
    LEDGER_TAMPERED = (
        "WR-3005",
        "A row of the privacy ledger was altered, inserted or removed.",
        "Restore the newest backup and compare its head with the one other hospitals witnessed; until then no round may run.",
    )
    LEDGER_MISSING = (
        "WR-3006",
        "There is no privacy ledger where the site expects one.",
        "Check the path; a lost ledger must be restored from backup, never founded anew for the same patients.",
    )
    LEDGER_DAMAGED = (
        "WR-3007",
        "The file is not a readable privacy ledger.",
        "Check the path, or restore the newest backup.",
    )
    LEDGER_WRITE = (
        "WR-3008",
        "The privacy ledger cannot be written.",
        "Free disk space and check the permissions of the ledger's folder; nothing was trained.",
    )
    LEDGER_BUSY = (
        "WR-3009",
        "Another process holds the privacy ledger.",
        "Wait for it, or stop the other process, and try again.",
    )
    MODEL_BATCH_NORM = (
        "WR-3010",
        "The model has batch normalisation, which mixes patients.",
        "Use a model with GroupNorm or LayerNorm.",
    )
    MODEL_TIED = (
        "WR-3011",
        "Two layers of the model share one trainable parameter.",
        "Freeze the shared parameter, or untie the layers.",
    )
    MODEL_UNSUPPORTED = (
        "WR-3012",
        "A trainable parameter lies in a layer for which there is no per-record gradient.",
        "Freeze the parameter, or choose another tuning (head, bitfit, lora).",
    )
    LOSS_SHAPE = (
        "WR-3013",
        "The loss is not one number per record.",
        "Return the unreduced loss, one value per row; never a mean over the batch.",
    )
    BATCH_LOST = (
        "WR-3014",
        "A layer saw another number of rows than there are records: it would clip parts of a patient.",
        "Keep the records on the first axis of every trainable layer; do not flatten time or windows into it.",
    )
    PACKED_SEQUENCE = (
        "WR-3015",
        "A trainable layer works on packed or reordered sequences, which mixes patients.",
        "Pad the sequences and pick the last valid step.",
    )
    GRADIENT_INEXACT = (
        "WR-3016",
        "The clipped sum differs from one computed record by record.",
        "The model mixes records or uses a layer unsuitably; choose another model or tuning.",
    )
    SENSITIVITY_EXCEEDED = (
        "WR-3017",
        "Leaving one patient out changes the clipped sum by more than the clip norm.",
        "The model mixes patients; choose another model.",
    )
    UPDATE_NOT_FINITE = (
        "WR-3018",
        "Training produced numbers that are not finite.",
        "Lower the learning rate, or check the study's settings; nothing was sent.",
    )
    TRAINABLES_DIFFER = (
        "WR-3019",
        "The model's trainable parameters are not those of the study.",
        "Rebuild the study bundle, or install the software version the study names.",
    )
    BUDGET_STUDY = (
        "WR-3020",
        "A study would cost a patient more epsilon than it declares.",
        "The study's noise or rounds do not fit its epsilon; build and sign it again.",
    )
    MODEL_RECURRENT = (
        "WR-3021",
        "A trained recurrent layer runs all time steps at once, so that no patient's share can be told apart.",
        "Use LoopLSTM or LoopGRU (client.privacy.recurrent), which load its weights, or freeze the layer.",
    )
    BUDGET_PLAN = (
        "WR-3023",
        "The plan's reserved steps are used up.",
        "The study has done, or tried, everything it was approved for; a longer one is a new study.",
    )
    PLAN_DIFFERS = (
        "WR-3024",
        "The ledger holds a reservation of this study for other work.",
        "Go on with the software version that reserved it, or withdraw the study: what was not run is then given back.",
    )
    # ---- 31xx approval and ceilings
    APPROVAL_STOPPED = (
        "WR-3101",
        "This hospital's kill switch is on.",
        "Remove the kill switch file when the hospital may take part again.",
    )
    APPROVAL_STUDY = (
        "WR-3102",
        "The study is not on this hospital's list of approved studies.",
        "Read `wardround plan`; if the study is wanted, add its digest to ceilings.approved_studies.",
    )
    APPROVAL_BACKBONE = (
        "WR-3103",
        "The study's backbone is not on this hospital's list of approved backbones.",
        "Review the model folder; if it is wanted, add its digest to ceilings.approved_backbones.",
    )
    APPROVAL_CODE = (
        "WR-3104",
        "The study asks for code that is not on this hospital's list of approved code.",
        "Install the release that the consortium agreed on, or approve its digest.",
    )
    APPROVAL_EPSILON = (
        "WR-3105",
        "The study would spend more epsilon than this hospital allows one study.",
        "Agree on a smaller privacy.epsilon, or raise ceilings.epsilon after a review.",
    )
    APPROVAL_DELTA = (
        "WR-3106",
        "The study's delta is larger than this hospital allows.",
        "Agree on a smaller privacy.delta, or raise ceilings.delta after a review.",
    )
    APPROVAL_ROUNDS = (
        "WR-3107",
        "The study has more rounds than this hospital allows.",
        "Agree on fewer training.rounds, or raise ceilings.rounds after a review.",
    )
    APPROVAL_PARTIES = (
        "WR-3108",
        "The study has fewer hospitals than this hospital's floor.",
        "Wait for more hospitals, or lower ceilings.minimum_sites after a review (never below 3).",
    )
    APPROVAL_NO_PRIVACY = (
        "WR-3109",
        "The study trains without differential privacy and this hospital requires it.",
        "Agree on privacy.mode: joint or local, or set ceilings.require_privacy: false after a review.",
    )
    APPROVAL_JOINT = (
        "WR-3114",
        "The study's epsilon counts on other hospitals' noise and this hospital does not accept that.",
        "Agree on privacy.mode: local, or set ceilings.accept_joint: true after a review.",
    )
    CODE_ALTERED = (
        "WR-3110",
        "An installed file of this program is altered, missing or extra.",
        "Install the release again in an empty environment; find out who changed the file.",
    )
    CODE_SHADOWED = (
        "WR-3111",
        "Another package owns one of the names common, client or server, or is found before ours.",
        "Install wardround alone in its own environment or container.",
    )
    APPROVAL_FORGED = (
        "WR-3112",
        "The record of an approval was altered, or was not made by this hospital.",
        "Find out who changed it; then review and approve the study again.",
    )
    APPROVAL_SITE = (
        "WR-3113",
        "The study or its roster does not name this hospital, or names it with another key.",
        "Ask the coordinator for the newest bundle; if it names another key, compare fingerprints by telephone.",
    )
    # ---- 32xx enrolment
    ENROL_FILE = (
        "WR-3201",
        "An invite, a join file or an offer is damaged, or is not a file of that kind.",
        "Ask its sender for the file again, as an attachment that no mail program rewrites.",
    )
    INVITE_SIGNATURE = (
        "WR-3202",
        "The invite is not signed by the coordinator's key that it names.",
        "Do not use the file; telephone the coordinator and ask for a new invite.",
    )
    INVITE_EXPIRED = (
        "WR-3203",
        "The invite is past its last day.",
        "Check this machine's clock; where it is right, ask the coordinator for a new invite (`wardround server invite`).",
    )
    INVITE_STALE = (
        "WR-3204",
        "A newer invite has replaced this one.",
        "Use the newest invite, and the join file that it gives.",
    )
    COORDINATOR_CHANGED = (
        "WR-3205",
        "The invite names another coordinator's key than the one this hospital pinned.",
        "Telephone the coordinator before anything else: either somebody poses as it, or it lost its key and everybody must enrol anew in a new state folder.",
    )
    SITE_MISMATCH = (
        "WR-3206",
        "The file is meant for another hospital.",
        "Compare the site id in site.yaml with that of the invite, and use one state folder for each hospital.",
    )
    NOT_ENROLLED = (
        "WR-3207",
        "This hospital has not joined a consortium.",
        "Ask the coordinator for an invite and run `wardround client join INVITE`.",
    )
    KEYS_UNPINNED = (
        "WR-3208",
        "The state folder has keys, but not the coordinator's key that belongs to them.",
        "Restore coordinator.json from a backup, or name a new state folder in site.yaml and join anew.",
    )
    INVITE_OTHER_STEP = (
        "WR-3209",
        "The invite is for another step: the first keys of a hospital, or new keys of an enrolled one.",
        "Run `wardround client join` for the first keys and `wardround client rotate` for new ones.",
    )
    JOIN_UNINVITED = (
        "WR-3210",
        "No invite is open for this hospital.",
        "Run `wardround server invite` and send the hospital the new file.",
    )
    JOIN_USED = (
        "WR-3211",
        "The invite behind this join file has been used: each admits one pair of keys.",
        "Run `wardround server roster` to see who was admitted; for new keys run `wardround server invite` again.",
    )
    JOIN_PROOF = (
        "WR-3212",
        "The join file does not prove that its sender holds both keys and the invite.",
        "Do not admit it; ask the hospital to run `wardround client join` again and to send the new file.",
    )
    JOIN_KEYS = (
        "WR-3213",
        "A key in the join file belongs to another hospital, or was given up before.",
        "Ask the hospital for new keys: `wardround client rotate`, or `client join` with a new state folder.",
    )
    WORDS_DIFFER = (
        "WR-3214",
        "The words that the hospital reads aloud are not those of the join file.",
        "Do not admit it: somebody may have exchanged the keys on the way. Ask for the file over another channel.",
    )
    WORDS_UNCONFIRMED = (
        "WR-3215",
        "Nobody has confirmed the words with the hospital.",
        "Telephone the hospital on a number known before; then run the command on a terminal, or with --words and what was read aloud.",
    )
    SITE_UNKNOWN = (
        "WR-3216",
        "No hospital with this site id has been admitted.",
        "Run `wardround server roster` for the list.",
    )
    SITE_TAKEN = (
        "WR-3217",
        "The site id belongs to another hospital, or is not free to use.",
        "Choose another with --site.",
    )
    NOT_INITIALISED = (
        "WR-3218",
        "The coordinator's state folder lacks a key, a certificate or a token.",
        "Run `wardround server init`; restore identity.key and tls/ from a backup if hospitals have joined already.",
    )
    CERTIFICATE_UNUSABLE = (
        "WR-3219",
        "The coordinator's certificate authority cannot be used.",
        "Restore tls/ from a backup; where that is not possible move it away, run `wardround server init` and send every hospital a new invite.",
    )
    SITE_NOT_ADMITTED = (
        "WR-3220",
        "A study names a hospital that has not been admitted, or was revoked.",
        "Invite and admit it, or build the study without it.",
    )
    OFFER_SIGNATURE = (
        "WR-3221",
        "The offer is not the pinned coordinator's for this study and this roster.",
        "Do not use the folder; ask the coordinator for it again and compare the study's digest by telephone.",
    )
    ENROL_STATE = (
        "WR-3222",
        "A file of the enrolment's own state is damaged.",
        "Restore the file named from a backup.",
    )
    # ---- 40xx cryptography and encoding
    MALFORMED = (
        "WR-4001",
        "A message is not the canonical encoding of anything.",
        "Check that both sides run the same Wardround version; if they do, the sender is faulty.",
    )
    OVERSIZED = (
        "WR-4002",
        "A message is longer, deeper or richer in items than its bound.",
        "Check that both sides run the same study; if they do, the sender is faulty.",
    )
    BAD_KEY = (
        "WR-4003",
        "A public key is malformed or weak.",
        "Ask the site named to make a new key and to hand over its public half again.",
    )
    BAD_AGREEMENT = (
        "WR-4004",
        "A key agreement cannot be completed with what the peer sent.",
        "Start the run handshake again; if it repeats, the peer or the network is hostile.",
    )
    BROKEN_SEAL = (
        "WR-4005",
        "A sealed message was altered, or sealed for another place in the protocol.",
        "Treat the round as burned and keep the transcript as evidence.",
    )
    BROKEN_VAULT = (
        "WR-4006",
        "A sealed record on disk was altered, misplaced, or sealed under another key.",
        "Restore the state folder from this site's own backup; never from another site's.",
    )
    BAD_SHARE = (
        "WR-4007",
        "A secret share is malformed or does not belong to its secret.",
        "Ask another survivor for its share; the transcript names the sender.",
    )
    NON_FINITE = (
        "WR-4008",
        "The local update holds a number that is not finite; nothing was sent.",
        "Lower the learning rate or look for broken numbers in the site's data.",
    )
    BAD_PLANES = (
        "WR-4009",
        "A masked update does not have the planes and lengths of its lane.",
        "Check that both sides run the same study; if they do, the sender is faulty.",
    )
    # ---- 41xx handshake
    HANDSHAKE_WRONG_STUDY = (
        "WR-4101",
        "A handshake names another study than the one approved here.",
        "Ask the coordinator which study it runs; approve that study first.",
    )
    HANDSHAKE_STALE = (
        "WR-4102",
        "A handshake message belongs to an epoch or run that is over.",
        "Nothing: the coordinator opens a new epoch.",
    )
    HANDSHAKE_MEMBERS = (
        "WR-4103",
        "The members of a handshake are not a quorum of the study's parties.",
        "The parties are fixed by the signed study; a coordinator cannot pick a subset below the quorum.",
    )
    HANDSHAKE_SIGNATURE = (
        "WR-4104",
        "A handshake message is not signed by the roster key of the site it names.",
        "Compare the roster's fingerprints out of band; somebody altered a key in transit.",
    )
    HANDSHAKE_DUPLICATE_KEY = (
        "WR-4105",
        "Two sites show the same ephemeral key.",
        "The coordinator or a site invents hospitals; compare rosters out of band.",
    )
    HANDSHAKE_OWN_KEY = (
        "WR-4106",
        "This site's own handshake key came back altered.",
        "The coordinator altered a message; report it to the consortium.",
    )
    HANDSHAKE_TRANSCRIPT = (
        "WR-4107",
        "A handshake message belongs to another transcript.",
        "The coordinator shows different sites different handshakes; report it.",
    )
    HANDSHAKE_ENCAPSULATION = (
        "WR-4108",
        "An encapsulation does not match the digest its sender signed.",
        "The message was altered in transit; the coordinator opens a new epoch.",
    )
    HANDSHAKE_CONFIRMATION = (
        "WR-4109",
        "A peer's key confirmation does not match: the pair has no common key.",
        "The epoch is discarded and its ephemeral keys are revealed to name the culprit.",
    )
    HANDSHAKE_INCOMPLETE = (
        "WR-4110",
        "A round names an epoch whose handshake this site has not finished.",
        "The coordinator opens a new epoch that includes this site.",
    )
    RUN_SECOND = (
        "WR-4111",
        "A second run of the same study was offered.",
        "One study has one live run; a new run needs a newly signed study.",
    )
    RUN_ENDED = (
        "WR-4112",
        "This site has ended the run and takes no further part.",
        "Read this site's audit log for the reason; a new study is needed.",
    )
    # ---- 42xx rounds
    ROUND_WRONG_RUN = (
        "WR-4201",
        "A round message names another study or run.",
        "Nothing: the message is ignored.",
    )
    ROUND_REPLAY = (
        "WR-4202",
        "A round number was used before.",
        "Round numbers only rise; the coordinator must take the next one.",
    )
    ROUND_TOO_MANY = (
        "WR-4203",
        "A round number is beyond what the signed study allows.",
        "Sign a new study for more rounds.",
    )
    ROUND_KIND = (
        "WR-4204",
        "A round's kind is not the one the signed study plans next.",
        "The order of training and evaluation comes from the study.",
    )
    ROUND_OUT_OF_ORDER = (
        "WR-4205",
        "A round message came in a phase in which it has no meaning.",
        "Nothing: the message is ignored.",
    )
    LINK_STALE = (
        "WR-4207",
        "A round builds on an older model than this site has already applied.",
        "The coordinator must serve the newest certified model.",
    )
    LINK_STATE = (
        "WR-4208",
        "The model served is not the one the last certified round trained.",
        "The coordinator serves another model; report it.",
    )
    LINK_QUORUM = (
        "WR-4209",
        "A link carries fewer valid signatures than the quorum.",
        "The coordinator must show the signatures of a quorum of survivors.",
    )
    LINK_EQUIVOCATION = (
        "WR-4210",
        "A link contradicts what this site signed in that round.",
        "The coordinator shows different sites different rounds; report it.",
    )
    LINK_MALFORMED = (
        "WR-4211",
        "A link's aggregate has the wrong shape.",
        "The coordinator's record is damaged; restore it.",
    )
    BASE_NEEDED = (
        "WR-4212",
        "This site is behind and needs the model's certified state.",
        "Nothing: the coordinator sends it.",
    )
    RETRY_UNCERTIFIED = (
        "WR-4213",
        "The same model is to be trained again without proof that the earlier round was burned.",
        "A quorum of burn signatures is needed.",
    )
    BURN_CERTIFICATE = (
        "WR-4214",
        "A round number was skipped without proof by a quorum that the skipped round was burned.",
        "The coordinator must show the burn signatures of every round since the last aggregate.",
    )
    BURN_AFTER_AGREE = (
        "WR-4215",
        "This site agreed to the round's survivors and cannot burn it.",
        "Finish the round: ask for the remaining agreements.",
    )
    AGREE_AFTER_BURN = (
        "WR-4216",
        "This site burned the round and cannot take part in it again.",
        "Start the next round.",
    )
    BURNS_EXHAUSTED = (
        "WR-4217",
        "More rounds were burned than this site tolerates.",
        "Find the hospital that fails every round in the audit log and re-sign the study without it.",
    )
    READY_DUPLICATE = (
        "WR-4218",
        "A second, different Ready came from one site in one round.",
        "A site's state was copied or rolled back; stop one of the two.",
    )
    PARTICIPANTS_UNKNOWN = (
        "WR-4219",
        "The participants include somebody who is not a member of this epoch.",
        "The coordinator invents hospitals; report it.",
    )
    PARTICIPANTS_WITHOUT_ME = (
        "WR-4220",
        "The participants do not include this site.",
        "Nothing: this site sits the round out.",
    )
    PARTICIPANTS_QUORUM = (
        "WR-4221",
        "Fewer participants than the quorum.",
        "The round must be burned.",
    )
    HEAD_SIGNATURE = (
        "WR-4222",
        "A participant's head is not signed by its roster key.",
        "Somebody forged or altered a message; report it.",
    )
    HEAD_MISMATCH = (
        "WR-4223",
        "A participant is on another model, round or configuration.",
        "The coordinator shows different sites different models; report it.",
    )
    HEAD_ALTERED = (
        "WR-4224",
        "This site's own head came back altered.",
        "The coordinator altered a message; report it.",
    )
    HEAD_TAG = (
        "WR-4225",
        "A pair tag differs: the pair does not share a seed.",
        "The pair's keys differ; a new epoch is needed.",
    )
    SHARE_UNREADABLE = (
        "WR-4226",
        "A participant's share does not decrypt.",
        "The sender or the coordinator altered it.",
    )
    SHARE_COMMITMENT = (
        "WR-4227",
        "A share does not match the commitment its dealer signed.",
        "The named dealer cheats or is damaged; exclude it by re-signing the study.",
    )
    SHARE_DEALER = (
        "WR-4228",
        "A dealer's committed shares do not rebuild the secret it committed to.",
        "The named dealer cheats or is damaged; exclude it by re-signing the study.",
    )
    PARTICIPANTS_EQUIVOCATED = (
        "WR-4229",
        "A second, different set of participants was shown in one round.",
        "The coordinator shows different sets; report it.",
    )
    SURVIVORS_UNKNOWN = (
        "WR-4230",
        "The survivors include somebody who was not a participant.",
        "The coordinator invents hospitals; report it.",
    )
    SURVIVORS_WITHOUT_ME = (
        "WR-4231",
        "The survivors do not include this site.",
        "Nothing: this site's upload stays unreadable.",
    )
    SURVIVORS_QUORUM = ("WR-4232", "Fewer survivors than the quorum.", "The round must be burned.")
    RECEIPT_SIGNATURE = (
        "WR-4233",
        "A survivor's upload receipt is not signed over this round's participants.",
        "The coordinator shows different participants to different sites; report it.",
    )
    SURVIVORS_EQUIVOCATED = (
        "WR-4234",
        "A second, different set of survivors was shown in one round.",
        "The coordinator tries a split view; report it.",
    )
    AGREEMENT_SIGNER = (
        "WR-4235",
        "An agreement is signed by somebody who is not a survivor.",
        "The coordinator forges agreements; report it.",
    )
    AGREEMENT_SIGNATURE = (
        "WR-4236",
        "An agreement does not verify over this round's survivors.",
        "The coordinator forges agreements or tries a split view; report it.",
    )
    AGREEMENT_QUORUM = (
        "WR-4237",
        "Fewer agreements than the quorum.",
        "The round must wait for more survivors to agree.",
    )
    LEDGER_ROLLBACK = (
        "WR-4238",
        "This site's ledger is older than the one other hospitals have witnessed.",
        "Restore the newest ledger; the run has ended at this site.",
    )
    LEDGER_ROLLBACK_PEER = (
        "WR-4239",
        "A participant shows an older ledger than it showed before.",
        "The named site restored an old ledger; it must leave the run.",
    )
    UPLOAD_SIGNATURE = (
        "WR-4240",
        "An upload is not signed by its site over this round's participants.",
        "The message was altered in transit; the site sends it again.",
    )
    UPLOAD_DIGEST = (
        "WR-4241",
        "An upload's planes do not match its signed root.",
        "The message was altered in transit; the site sends it again.",
    )
    UPLOAD_SHAPE = (
        "WR-4242",
        "An upload's lanes have the wrong number or length.",
        "The site's software differs from the study; update it.",
    )
    UNMASK_SHAPE = (
        "WR-4243",
        "An unmask answer does not hold exactly the shares the survivors call for.",
        "The named site cheats or is damaged.",
    )
    SIGNER_UNKNOWN = (
        "WR-4244",
        "A message names a signer who is not a party of the study.",
        "Nothing: the message is ignored.",
    )
    RECOVERY_BLOB = (
        "WR-4245",
        "A dropped site's recovery blob does not open or holds wrong seeds.",
        "The named site cheats or is damaged; exclude it by re-signing the study.",
    )
    PEER_ACCUSED = (
        "WR-4247",
        "A site refused another site's part of a round.",
        "Look at both sites' audit logs; one accuser may lie, several do not.",
    )
    MESSAGE_SIGNATURE = (
        "WR-4246",
        "A site's message is not signed by its roster key.",
        "The message was altered or forged; nothing was changed by it.",
    )
    END_UNPROVEN = (
        "WR-4248",
        "A run was declared over before its last turn, without enough hospitals' word that their budgets are spent.",
        "Nothing: this hospital goes on waiting; ask the coordinator's operator.",
    )
    # ---- 50xx aborted rounds and runs
    QUORUM_LOST = (
        "WR-5001",
        "Fewer sites than the quorum could be reached.",
        "Bring the named sites back and resume; nothing is lost.",
    )
    ROUND_UNDECIDED = (
        "WR-5002",
        "A round can neither be finished nor burned until named sites return.",
        "Bring the named sites back and resume.",
    )
    RUN_STARVED = (
        "WR-5003",
        "The run ended because too many rounds were burned or refused.",
        "Read the audit log for the named cause; re-sign the study without the failing hospital.",
    )
    DISPUTE_LOST = (
        "WR-5004",
        "A handshake dispute was decided against a site.",
        "Exclude the named site by re-signing the study.",
    )
    BUDGETS_SPENT = (
        "WR-5005",
        "So many hospitals have spent their privacy budget that no round can reach the quorum.",
        "The run ends here with what it reached; only the data stewards can raise a cap, and a new study with more noise or fewer rounds spends less.",
    )
    # ---- 60xx storage
    JOURNAL_WRITE = (
        "WR-6001",
        "A journal could not be written.",
        "Free disk space or fix the folder's permissions, then resume; nothing is lost.",
    )
    JOURNAL_DAMAGED = (
        "WR-6002",
        "A journal record is damaged.",
        "Restore the folder from a backup made after its last round, or let this site rejoin with a new study.",
    )
    FOLDER_IN_USE = (
        "WR-6003",
        "Another process is using this folder.",
        "Stop the other process, or give this one its own folder.",
    )
    KEY_FILE_OPEN = (
        "WR-6005",
        "A key file can be read by others than its owner.",
        "Run `chmod 600` on the file named; if others may have read it, make a new identity and enrol again.",
    )
    KEY_FILE_DAMAGED = (
        "WR-6006",
        "A key file is damaged.",
        "Restore it from a backup; without it this site must enrol again.",
    )
    OUTPUT_NOT_EMPTY = (
        "WR-6007",
        "The output folder is not empty.",
        "Name another folder with --out, or resume the run that lies there.",
    )
    NOT_A_RUN = (
        "WR-6008",
        "The folder holds no run.",
        "Name the output folder of `wardround simulate`.",
    )
    INPUTS_CHANGED = (
        "WR-6009",
        "The data files differ from those the run began with.",
        "Put the original files back, or start a new run.",
    )
    BUNDLE_DAMAGED = (
        "WR-6004",
        "A study bundle's files do not match each other.",
        "Build the bundle again with `wardround study build`.",
    )
    AUDIT_WRITE = (
        "WR-6040",
        "The audit log could not be written; without a log nothing goes on.",
        "Free disk space or fix the folder's permissions, then resume.",
    )
    AUDIT_BROKEN = (
        "WR-6041",
        "The audit log's chain is broken.",
        "Keep the file as evidence, run `wardround audit verify` on it, and find out who changed it.",
    )
    AUDIT_CHANGED = (
        "WR-6042",
        "Something else wrote to the audit log.",
        "Stop the other process, then run `wardround audit verify` on the folder.",
    )
    AUDIT_MISSING = (
        "WR-6043",
        "There is no audit log to verify here.",
        "Name the folder of a run, or its `audit` folder.",
    )
    AUDIT_KEYS = (
        "WR-6044",
        "The table of audit keys cannot be read.",
        "Restore keys.json from the run's folder, or from another party of the run.",
    )
    LOG_OPEN = (
        "WR-6050",
        "The log file could not be opened.",
        "Check that its folder exists and that this user may write there.",
    )
    ROSTER_WRITE = (
        "WR-6051",
        "The roster file could not be written.",
        "Check the folder's permissions and the free space, then try again.",
    )
    # ---- 70xx command line and output
    MODEL_DIVERGED = (
        "WR-7040",
        "The aggregated model is no longer made of finite numbers.",
        "Lower the server learning rate or the sites' learning rate, sign the study again, and start anew.",
    )
    ARITHMETIC_FLUSHES = (
        "WR-7041",
        "This process's floating point drops subnormal numbers, so its model digest would differ from everyone else's.",
        "Unset torch.set_flush_denormal or remove the library that switches flush-to-zero on.",
    )
    REPORT_WRITE = (
        "WR-7042",
        "A file of the report could not be written.",
        "Free disk space or fix the output folder's permissions, then run `wardround server report` again.",
    )
    PLAN_IMPOSSIBLE = (
        "WR-7043",
        "No noise can meet the study's privacy target.",
        "Raise epsilon, lower rounds, local_steps or sampling_rate, or use more patients.",
    )
    JOINT_RING = (
        "WR-7044",
        "The ring has no room for joint noise.",
        "Lower training.expected_batch, train fewer parameters (lora, bitfit, head) or use privacy.mode: local.",
    )
    # ---- deployment: the coordinator's run
    NOT_PUBLISHED = (
        "WR-8001",
        "A bundle was not published by the coordinator.",
        "The coordinator publishes it first, `wardround server publish BUNDLE`, and hands that folder out.",
    )
    RUN_UNFINISHED = (
        "WR-8002",
        "The run is not over.",
        "Go on with it: `wardround server resume`.",
    )
    PORT_TAKEN = (
        "WR-8003",
        "A listener's port is in use.",
        "Stop the other program, or choose another port in coordinator.yaml.",
    )
    USAGE = (
        "WR-7001",
        "The command line is not understood.",
        "Type `wardround --help` for the commands, or the command with --help for its options.",
    )
    NOT_INSTALLED = (
        "WR-7002",
        "The command needs a part of wardround that is not installed here.",
        "Install the extra named, or run the command on a machine that has it.",
    )
    UNKNOWN_CODE = (
        "WR-7003",
        "There is no error with this code.",
        "Type `wardround errors` for the list.",
    )
    # ---- 81xx the line between a hospital and the coordinator
    UNREACHABLE = (
        "WR-8101",
        "The coordinator cannot be reached.",
        "Nothing if it passes: the hospital keeps trying. Otherwise ask whether the coordinator runs, and let the firewall pass outgoing HTTPS to its address.",
    )
    PROXY_REFUSED = (
        "WR-8102",
        "The hospital's own HTTPS proxy does not pass the connection on.",
        "Ask the network team to allow CONNECT to the coordinator's address, or correct link.proxy in site.yaml.",
    )
    SERVER_CERTIFICATE = (
        "WR-8103",
        "What answers at the coordinator's address does not show a certificate of the pinned authority.",
        "If a proxy breaks TLS open, have it pass this address untouched; if the clock is far off, set it; otherwise ask the coordinator, by telephone, whether its authority changed.",
    )
    CLOCK_OFF = (
        "WR-8104",
        "This machine's clock is too far from the coordinator's.",
        "Set the clock (systemctl status systemd-timesyncd, or chronyc tracking); the hospital goes on by itself.",
    )
    NOT_ADMITTED = (
        "WR-8105",
        "The coordinator does not let this hospital's transport key in.",
        "If the hospital was just restarted, wait a minute; otherwise ask the coordinator whether the site is admitted, revoked or its key was rotated.",
    )
    SERVER_FAULT = (
        "WR-8106",
        "The coordinator, or a machine on the way, answers with an error or with something unreadable.",
        "Nothing if it passes: the hospital keeps trying. Otherwise ask the coordinator to look at its log.",
    )
    BAD_QUESTION = (
        "WR-8107",
        "A question of the coordinator does not have the form agreed on, or its parts do not match their digests.",
        "Check that both sides run the same Wardround version; if they do, somebody on the way alters messages.",
    )
    WINDOW_CLOSED = (
        "WR-8108",
        "A large transfer waits for the hours that this hospital allows.",
        "Nothing: it goes on when link.window in site.yaml opens; deadlines of the study must allow for it.",
    )
    INTERNAL_FAULT = (
        "WR-8109",
        "A program error at a hospital; its text does not leave the hospital.",
        "Read that hospital's own log and report the fault.",
    )
    LINK_SETTINGS = (
        "WR-8110",
        "The coordinator's address, the proxy, the pinned authority or the transport key cannot be used.",
        "Correct what is named; `wardround client join` writes these files anew.",
    )

    # ---- 82xx the coordinator's listeners
    LISTENER_PORT = (
        "WR-8201",
        "The coordinator cannot listen on the address that coordinator.yaml names.",
        "Stop the program that holds the port (ss -ltnp names it), or give another address under listen or admin in coordinator.yaml.",
    )
    LISTENER_TLS = (
        "WR-8202",
        "The coordinator's TLS certificate or its key cannot be used.",
        "Make them anew with `wardround server renew`; the key file must be readable by this user alone.",
    )
    ADMIN_NOT_LOOPBACK = (
        "WR-8203",
        "The admin listener may be reached from other machines.",
        "Set admin.host in coordinator.yaml to 127.0.0.1; reach it from elsewhere through an SSH tunnel.",
    )
    FLOWER_STATE = (
        "WR-8204",
        "The transport's database cannot be opened.",
        "Free disk space and fix the folder's permissions; a damaged flower folder may be removed while the coordinator is stopped: runs go on from their journals, and hospitals are registered anew from the admitted sites.",
    )
    TRANSPORT_KEY = (
        "WR-8205",
        "A hospital's transport key cannot be registered.",
        "It must be an EC P-384 public key that no other and no revoked site used; let the hospital run `wardround client rotate`.",
    )

    # ---- 83xx stock Flower and Ray
    RESIDENT_SETTING = (
        "WR-8301",
        "The SuperNode's own configuration does not name this hospital's site.yaml.",
        "Start it with --node-config 'wardround-site=\"/absolute/path/of/site.yaml\"'; wardround-idle-s, if given, is a number of seconds.",
    )
    RESIDENT_LOST = (
        "WR-8302",
        "The hospital's resident process did not start, or ended before it answered.",
        "Read resident.log in the hospital's state folder; the next question starts the process anew.",
    )
    NOT_ON_RAY = (
        "WR-8303",
        "The study's simulation asks for something that does not exist on Ray.",
        "Take what is named out of the study's section simulation, or simulate without --engine ray.",
    )

    def __init__(self, label: str, meaning: str, remedy: str) -> None:
        self.label = label
        self.meaning = meaning
        self.remedy = remedy
