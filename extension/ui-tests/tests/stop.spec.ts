import { PROMPT, expect, openNotebook, test } from './djinn';

test('a run in a notebook stops where it was told', async ({ page, tmpPath }) => {
  await openNotebook(page, tmpPath, 'stop.ipynb', [
    '%load_ext djinn_nb\n%djinn_connect\n%djinn_break 20',
    `%%djinn_run --max-new-tokens 24\n${PROMPT}`
  ]);

  await page.notebook.run();

  await expect(
    page.getByRole('region', { name: 'Djinn: stopped at layers.20.output' })
  ).toBeVisible();
});
