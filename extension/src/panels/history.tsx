// What was done, newest first, with the Python that repeats it.
import * as React from 'react';
import { Clipboard, Notification } from '@jupyterlab/apputils';
import { addBelowIcon, copyIcon } from '@jupyterlab/ui-components';
import type { PartProps } from './parts';
import { IconButton } from './parts';

export function History(
  props: PartProps & { readonly insert: (code: string) => void }
): React.ReactElement {
  const { trans, view } = props;
  const actions = [...(view.snapshot?.actions ?? [])].reverse();
  if (actions.length === 0) {
    return (
      <p className="jp-Djinn-empty">
        {trans.__('What you click is noted here as Python, to keep or repeat.')}
      </p>
    );
  }
  return (
    <ul className="jp-Djinn-list">
      {actions.map(action => (
        <li key={action.number} className="jp-Djinn-action">
          <div className="jp-Djinn-row">
            <span className="jp-Djinn-grow">{action.label}</span>
            <span className="jp-Djinn-note">
              {action.outcome === 'running'
                ? trans.__('running')
                : action.outcome === 'failed'
                  ? trans.__('refused')
                  : ''}
            </span>
            <IconButton
              icon={copyIcon}
              label={trans.__('Copy code')}
              onClick={() => {
                Clipboard.copyToSystem(action.code);
                Notification.info(trans.__('Copied.'), { autoClose: 1500 });
              }}
            />
            <IconButton
              icon={addBelowIcon}
              label={trans.__('Insert cell')}
              caption={trans.__('Insert a cell with this code below')}
              onClick={() => props.insert(action.code)}
            />
          </div>
          <pre className="jp-Djinn-source" tabIndex={0}>
            {action.code}
          </pre>
          {action.error && <p className="jp-Djinn-note">{action.error}</p>}
        </li>
      ))}
    </ul>
  );
}
