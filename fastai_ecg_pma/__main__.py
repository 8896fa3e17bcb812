"`python -m fastai_ecg_pma VERB …` is `ecg-pma VERB …`"
from fastai_ecg_pma.cli import main

raise SystemExit(main())
