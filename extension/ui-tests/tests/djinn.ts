// What the specs share: a notebook with cells, and a second client of the same kernel server.
import { execFileSync } from 'node:child_process';
import { expect, galata, test as base } from '@jupyterlab/galata';
import type { IJupyterLabPageFixture } from '@jupyterlab/galata';

export { expect };

export type Lab = IJupyterLabPageFixture;

export const PROMPT =
  'When Mary and John went to the store, John gave a drink to';

/** The tests of the lab as a user has it: no news, the theme named, nothing else changed. */
export const test = base.extend({
  mockSettings: {
    ...galata.DEFAULT_SETTINGS,
    '@jupyterlab/apputils-extension:notification': { fetchNews: 'false' }
  }
});

/** Write a notebook of code cells into the test's folder, open it, and wait for its kernel. */
export async function openNotebook(
  page: Lab,
  folder: string,
  name: string,
  cells: string[]
): Promise<void> {
  const notebook = {
    cells: cells.map((source, index) => ({
      cell_type: 'code',
      execution_count: null,
      id: `cell-${index}`,
      metadata: {},
      outputs: [],
      source
    })),
    metadata: {
      kernelspec: {
        display_name: 'Python 3',
        language: 'python',
        name: 'python3'
      }
    },
    nbformat: 4,
    nbformat_minor: 5
  };
  const path = `${folder}/${name}`;
  await page.contents.uploadContent(JSON.stringify(notebook), 'text', path);
  await page.notebook.openByPath(path);
  await page.notebook.activate(name);
  await expect(page.getByText('(ipykernel) | Idle')).toBeVisible();
}

/** Run Python beside the lab, as another client of its kernel server; returns what it printed. */
export function beside(code: string): string {
  return execFileSync(process.env.DJINN_PYTHON ?? 'python', ['-c', code], {
    encoding: 'utf-8',
    timeout: 240_000
  });
}

/** The median of some timings. */
export function median(values: number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)];
}
