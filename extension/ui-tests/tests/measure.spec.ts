// The measures can fail: a slow click is seen to be slow, a bad page is found to be bad.
import { expect, test } from './djinn';
import { clickToPaint, seriousFindings } from './measure';

test('a click whose handler takes 200 ms is measured as such', async ({
  page
}) => {
  await page.evaluate(() => {
    const button = document.createElement('button');
    button.textContent = 'slow probe';
    button.style.cssText = 'position:fixed;top:40%;left:40%;z-index:99999';
    button.onclick = () => {
      const until = performance.now() + 200;
      while (performance.now() < until) {
        // what a bad handler does
      }
      button.setAttribute('data-done', 'true');
    };
    document.body.append(button);
  });

  const took = await clickToPaint(
    page,
    page.getByRole('button', { name: 'slow probe' }),
    '[data-done=true]'
  );

  expect(took).toBeGreaterThanOrEqual(200);
  expect(took).toBeLessThan(60_000);
});

test('a button without a name is found', async ({ page }) => {
  await page.evaluate(() => {
    const place = document.createElement('div');
    place.id = 'bad-probe';
    place.innerHTML = '<button></button><img src="data:,">';
    document.body.append(place);
  });

  const findings = await seriousFindings(page, '#bad-probe');

  expect(findings.some(line => line.startsWith('button-name'))).toBe(true);
  expect(findings.some(line => line.startsWith('image-alt'))).toBe(true);
});
