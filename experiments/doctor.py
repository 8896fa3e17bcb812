"""A verdict on each record of folders with WFDB records, as small tables

    python experiments/doctor.py FOLDER... --out OUT

OUT/folders.csv has one row a folder (records, verdicts, and how many records the paper's preprocessing would refuse), OUT/problems.csv how many records of it have which
problem, OUT/records.csv the odd and bad records with their reasons, OUT/NAME.txt the report as `ecg-pma doctor FOLDER` prints it. None of them holds samples.
"""
import argparse
from pathlib import Path

import pandas as pd
from rich.console import Console

from fastai_ecg_pma.doctor import check_records, report
from fastai_ecg_pma.records import PREPROCESS


def summary(name, checks, refused):
    n = checks.verdict.value_counts()
    return dict(folder=name, records=len(checks), good=n.get('good', 0), odd=n.get('odd', 0), bad=n.get('bad', 0), leads=checks.n_leads.max(), hz=' '.join(f'{f:g}' for f in sorted(checks.fs.dropna().unique())),
                seconds=f'{checks.seconds.min():g}-{checks.seconds.max():g}', refused_by_pma=refused)


def problems(name, checks):
    have = checks.problems[checks.problems != ''].str.split(', ').explode().value_counts()
    return [dict(folder=name, problem=p, records=n) for p, n in have.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folders', nargs='+', type=Path); parser.add_argument('--out', type=Path, default=Path('experiments/doctor')); parser.add_argument('--n-workers', type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    folders, found, records = [], [], []
    for folder in args.folders:
        name = folder.resolve().name
        checks, asked = (check_records(folder, prep, args.n_workers) for prep in (None, PREPROCESS['pma']))
        with open(args.out/f'{name}.txt', 'w') as f: Console(file=f, width=160).print(report(checks))
        folders.append(summary(name, checks, (asked.verdict == 'bad').sum())); found += problems(name, checks)
        records.append(checks.loc[checks.verdict != 'good', ['record', 'verdict', 'reasons']].assign(folder=name))
        print((args.out/f'{name}.txt').read_text())
    pd.DataFrame(folders).to_csv(args.out/'folders.csv', index=False)
    pd.DataFrame(found, columns=['folder', 'problem', 'records']).to_csv(args.out/'problems.csv', index=False)
    pd.concat(records)[['folder', 'record', 'verdict', 'reasons']].to_csv(args.out/'records.csv', index=False)


if __name__ == '__main__': main()
